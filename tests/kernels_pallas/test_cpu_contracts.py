"""Native CPU kernels refuse operands that do not fit each other, and read past no end."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxserve.engine import native_ops
from kernels_pallas import cpu
from kernels_pallas.cpu import ops
from kernels_pallas.linear import linear as linear_reference
from kernels_pallas.op import UnsupportedError
from kernels_pallas.paged_attention.cases import batch as step_of
from kernels_pallas.paged_attention.codec import empty
from kernels_pallas.rope import rotate
from kernels_pallas.target import CPU

pytestmark = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler")


def refusal(run, *operands, **options) -> str:
    """What is said of operands that do not fit."""
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT") as raised:
        jax.block_until_ready(run(*operands, **options))
    return str(raised.value)


@pytest.mark.parametrize("shape", [((1, 4), (1, 4)), ((6, 4), (1, 4)), ((6, 4), (6, 3))])
def test_rope_has_a_row_of_angles_for_each_token(shape):
    cos, sin = (jnp.ones(s) for s in shape)
    assert "cos and sin must be [T, pairs]" in refusal(cpu.rope, jnp.ones((6, 2, 8)), cos, sin)


def test_one_table_serves_all_sequences():
    x = jax.random.normal(jax.random.key(0), (3, 5, 2, 8))
    angles = jax.random.normal(jax.random.key(1), (1, 5, 1, 4))
    table = jnp.cos(angles), jnp.sin(angles)
    got = native_ops._rotate(x, table, num_rows=jnp.int32(15))
    np.testing.assert_allclose(got, rotate(x, table), rtol=1e-6, atol=1e-6)


EXPERTS = {"x": (6, 32), "ids": (6, 2), "weights": (6, 2), "gate": (3, 16, 32),
           "up": (3, 16, 32), "down": (3, 32, 16)}  # fmt: skip


def experts(dtypes=(), **shapes):
    x, ids, weights, *ws = (jnp.zeros(shapes.get(n, s)) for n, s in EXPERTS.items())
    ws = [w.astype(d) for w, d in zip(ws, dtypes or ["float32"] * 3, strict=True)]
    return cpu.experts(x, ids.astype(jnp.int32), weights, *ws)


@pytest.mark.parametrize(
    "shapes",
    [
        {"x": (6, 40)},
        {"gate": (3, 16, 40)},
        {"up": (3, 8, 32)},
        {"up": (2, 16, 32)},
        {"down": (3, 32, 8)},
        {"down": (3, 16, 32)},
        {"dtypes": ("float32", "float32", "bfloat16")},
    ],
)
def test_experts_have_weights_that_fit(shapes):
    assert "w_down" in refusal(experts, **shapes)


@pytest.mark.parametrize("shapes", [{"ids": (1, 2)}, {"weights": (6, 1)}, {"weights": (1, 2)}])
def test_experts_are_asked_by_every_token(shapes):
    assert "ids and weights must be [T, A]" in refusal(experts, **shapes)


def attend(
    kind, *, q=4, k=2, v=2, pages=(2, 2), sizes=(8, 8), dtypes=("float32",) * 2, sinks=None, **batch
):
    T, H, R = 12, 16, 2
    rows = {n: jnp.ones((T, heads, H)) for n, heads in {"q": q, "k": k, "v": v}.items()}
    cache = [jnp.zeros((1, 4, n, z, H), d) for n, z, d in zip(pages, sizes, dtypes, strict=True)]
    if kind == "latent":
        rows["v"], cache[1] = None, None
    starts = jnp.asarray(batch.get("starts", [0, 4, T]), jnp.int32)
    lens = jnp.asarray(batch.get("lens", [4, 8]), jnp.int32)
    tables = jnp.zeros(batch.get("tables", (R, 2)), jnp.int32)
    return cpu.paged_attention(
        *rows.values(), *cache, 0, starts, lens, tables, R, scale=1.0, value_dim=H, sinks=sinks
    )[0]


@pytest.mark.parametrize("kind", ["plain", "latent"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 1}, r"k and v must be \[T, K, H\]"),
        ({"q": 3}, "a multiple of 2 heads"),
        ({"tables": (1, 2)}, r"\[R \+ 1\], \[R\] and \[R, M\]"),
        ({"lens": [4]}, r"\[R \+ 1\], \[R\] and \[R, M\]"),
        ({"lens": [4, 17]}, "has 17 keys, 8 of them new, and pages for 16"),
        ({"lens": [3, 8]}, "has 3 keys, 4 of them new"),
        ({"sinks": jnp.ones(3)}, r"\[N\] or \[L, N\] for N = 4 heads of q, not \[3\]"),
        ({"starts": [0, 4, 13]}, "has rows 4 to 13"),
        ({"starts": [0, 12, 4]}, "has rows 12 to 4|has 4 keys, 12 of them new"),
    ],
)
def test_attention_has_rows_and_pages_for_all(kind, options, message):
    assert re.search(message, refusal(attend, kind, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"v": 1}, r"k and v must be \[T, K, H\]"),
        ({"pages": (2, 1)}, "pages have 2 and 1 heads"),
        ({"sizes": (8, 16)}, "8 and 16 slots"),
        ({"dtypes": ("float32", "bfloat16")}, "must have one dtype"),
    ],
)
def test_attention_keeps_keys_and_values_alike(options, message):
    assert re.search(message, refusal(attend, "plain", **options))


def test_what_fits_is_attended():
    assert attend("plain").shape == attend("latent").shape == (12, 4, 16)


@pytest.mark.parametrize(("layer", "taken"), [(-1, 2), (-7, 0), (7, 2)])
def test_no_layer_lies_outside_its_stack(layer, taken):
    w = jax.random.normal(jax.random.key(0), (3, 8, 16))
    x = jax.random.normal(jax.random.key(1), (4, 16))
    assert jnp.array_equal(lax.dynamic_index_in_dim(w, layer, keepdims=False), w[taken])
    (got,), (expected,) = cpu.linear(x, (w,), layer=layer), cpu.linear(x, (w[taken],))
    np.testing.assert_array_equal(got, expected)


def test_products_have_the_size_of_their_weights():
    x, w, narrow = jnp.ones((2, 8)), jnp.ones((8, 8)), jnp.ones((6, 8))
    assert "do not fit" in refusal(cpu.linear, x, (w,), shapes=[(16,)])
    assert "do not fit" in refusal(cpu.gated_linear, x, w, narrow)
    residual = jnp.ones((2, 16))
    assert "do not fit" in refusal(cpu.linear, x, (w,), shapes=[(16,)], residual=residual)


HALF, HALVES = jnp.float16, jnp.ones((4, 8), jnp.float16)
REFUSED_PAGES = {
    "two kinds": ({"dtypes": (jnp.int8, jnp.float32)}, "Int8Pages and pages of float32"),
    "two types": (
        {"dtypes": (jnp.bfloat16, jnp.float32)},
        "pages of bfloat16 and pages of float32",
    ),
    "halves": ({"dtypes": (HALF, HALF)}, "float16 and float16: .* take float32, bfloat16, uint16"),
    "wide": ({"W": 64}, "rows of 32 lanes do not fit pages of 64"),
    "a cut part": ({"dtypes": (jnp.int4, jnp.int4), "value_dim": 16}, "value_dim=16 .* end a part"),
}


@pytest.mark.parametrize("name", REFUSED_PAGES)
def test_pages_that_native_kernels_do_not_read_are_left_to_the_reference(name):
    given, message = REFUSED_PAGES[name]
    given = {"dtypes": (jnp.float32,) * 2, "W": 32, "value_dim": None} | given
    step, P = step_of((1, 3), (9, 5), 8)
    rows = (jnp.ones((4, heads, 32)) for heads in (4, 2, 2))
    cache = [empty(dtype, (1, P, 2, 8, given["W"])) for dtype in given["dtypes"]]
    args = (*rows, *cache, 0, jax.tree.map(jnp.asarray, step))
    run = partial(ops.paged_attention, target=CPU, scale=0.1, value_dim=given["value_dim"])
    assert run(*args)[1].shape == (4, 4)
    with pytest.raises(UnsupportedError, match=message):
        run(*args, implementation="native")


@pytest.mark.parametrize(
    ("op", "args", "options"),
    [
        (ops.gated_linear, (jnp.ones((2, 8)), HALVES, HALVES), {"activation": "silu"}),
        (ops.gated_linear, (HALVES, jnp.ones((3, 8)), jnp.ones((3, 8))), {"activation": "silu"}),
        (ops.rms_norm, (jnp.ones((1, 2, 8)), jnp.ones(8, HALF)), {"eps": 1e-6}),
    ],
)
def test_halves_are_left_to_the_reference(op, args, options):
    run = partial(op, *args, target=CPU, **options)
    np.testing.assert_array_equal(run(), op.reference(*args, **options))
    with pytest.raises(UnsupportedError, match=r"float16.*: the C\+\+ kernels take float32"):
        run(implementation="native")


def test_products_of_halves_are_those_of_the_reference():
    w = jnp.ones((3, 8))
    found = ops.linear(HALVES, w, target=CPU)
    np.testing.assert_array_equal(found, linear_reference(HALVES, w))


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_a_gate_of_no_rows(shape):
    w = jnp.ones((4, 8))
    found = ops.gated_linear(jnp.ones(shape), w, w, activation="silu", target=CPU)
    assert found.shape == (*shape[:-1], 4)
