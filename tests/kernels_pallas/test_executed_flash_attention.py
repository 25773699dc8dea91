"""Hopper's attention over packed rows and its slopes, executed as their PTX: `hopper`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.flash_attention import flash_attention, flash_attention_gradient, reference
from kernels_pallas.flash_attention.gpu_blocks import GpuTile
from kernels_pallas.flash_attention.mosaic_gpu import ForwardTile
from tests.kernels_pallas.executing import agree, case_of, executing
from tests.kernels_pallas.hopper.block import SCHEDULES
from tests.sparing import sparing

pytestmark = [pytest.mark.aot, pytest.mark.usefixtures("no_compilation_cache")]


def check(op, args, arrays, options, tile=None, **how):
    with executing(**how) as findings:
        found = op.bodies["mosaic_gpu"].run(*args, **arrays, **options, tile=tile)
    assert not findings
    agree(found, op.reference(*args, **arrays, **options), 0.01)


CASES = [case.name for case in flash_attention.cases if not case.shipped]


@pytest.mark.parametrize("name", sparing(CASES, "window-sinks-cap"))
def test_attention_over_packed_rows(name):
    check(flash_attention, *case_of(flash_attention, name))


@pytest.mark.parametrize("name", sparing(CASES, "window-sinks-cap"))
def test_slopes_of_attention(name):
    check(flash_attention_gradient, *case_of(flash_attention_gradient, name))


@pytest.mark.slow
@pytest.mark.parametrize("op", [flash_attention, flash_attention_gradient], ids=lambda x: x.name)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_whenever_copies_happen(op, schedule, seed):
    check(op, *case_of(op, "packed"), schedule=schedule, seed=100 * seed)


def segments(*rows):
    """Of words and lengths: (("a", 70), (".", 58)); a dot is padding."""
    numbers = [np.concatenate([np.full(n, 0 if c == "." else ord(c) - 96) for c, n in row])
               for row in rows]  # fmt: skip
    return jnp.asarray(np.stack(numbers), jnp.int32)


ROWS = {
    "whole": (("a", 384),),
    "odd": (("a", 70), ("b", 1), ("c", 200), ("d", 113)),
    "padding behind": (("a", 129), ("b", 100), (".", 155)),
    "padding in front and between": ((".", 65), ("a", 90), (".", 30), ("b", 199)),
    "nothing": ((".", 384),),
}


def operands(row, N, K, H, Hv, sinks):
    """Two rows: one as told, and one of other documents, which it must not meet."""
    told = segments(row, ROWS["odd"])
    keys = jax.random.split(jax.random.key(5), 5)
    shapes = (2, N, 384, H), (2, K, 384, H), (2, K, 384, Hv), (2, N, 384, Hv)
    q, k, v, do = (jax.random.normal(x, s, jnp.bfloat16)
                   for x, s in zip(keys[:4], shapes, strict=True))  # fmt: skip
    arrays = {"sinks": jnp.linspace(-1.0, 1.0, N)} if sinks else {}
    return (q, k, v, told), arrays, do, jax.random.normal(keys[4], (2, N, 384))


def check_both(row, tiles, *, N=2, K=1, H=64, Hv=64, sinks=False, **options):
    args, arrays, do, dlse = operands(row, N, K, H, Hv, sinks)
    options = {"scale": H**-0.5, **options}
    check(flash_attention, args, arrays, options, tiles[0])
    o, lse = reference.attend(*args, **arrays, **options)
    check(flash_attention_gradient, (*args, o, lse, do, dlse), arrays, options, tiles[1])


NARROW = ForwardTile(64, 2, 1), GpuTile(64, 2)
FORMS = {
    "plain": {},
    "window of one": {"window": 1},
    "window": {"window": 100},
    "window that hides nothing": {"window": 500},
    "cap": {"soft_cap": 2.0},
    "sinks": {"sinks": True},
    "all": {"window": 100, "soft_cap": 2.0, "sinks": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("form", ["plain", "all"])
def test_documents_of_any_length(row, form):
    check_both(ROWS[row], NARROW, **FORMS[form])


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_what_is_seen(form):
    """Wider tiles, of which a row begins and ends within some."""
    check_both(ROWS["odd"], (ForwardTile(128, 2, 1), GpuTile(64, 3)), N=1, **FORMS[form])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("N", "K", "H", "Hv"), [(4, 2, 64, 128), (3, 1, 128, 64), (2, 2, 128, 128)]
)
def test_heads_of_any_width_that_share_keys(N, K, H, Hv):
    check_both(ROWS["padding behind"], NARROW, N=N, K=K, H=H, Hv=Hv)


FORWARD = [ForwardTile(tokens, stages, ping_pong)
           for tokens in (128, 64) for stages in (2, 3, 4) for ping_pong in (1, 0)]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("tile", FORWARD, ids=str)
def test_attention_in_any_tile(tile):
    args, arrays, _, _ = operands(ROWS["odd"], 1, 1, 64, 64, sinks=True)
    check(flash_attention, args, arrays, {"scale": 0.2, "window": 150}, tile)


@pytest.mark.slow
@pytest.mark.parametrize("tile", [GpuTile(n, s) for n in (128, 64) for s in (2, 3, 4)], ids=str)
def test_slopes_in_any_tile(tile):
    args, arrays, do, dlse = operands(ROWS["odd"], 2, 1, 64, 64, sinks=True)
    options = {"scale": 0.2, "window": 150}
    o, lse = reference.attend(*args, **arrays, **options)
    check(flash_attention_gradient, (*args, o, lse, do, dlse), arrays, options, tile)
