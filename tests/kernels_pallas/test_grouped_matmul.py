"""What is special about the grouped product: which rows meet which expert, and who is not read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.grouped_matmul import grouped_matmul
from kernels_pallas.grouped_matmul.mosaic_gpu import Tile as GpuTile
from kernels_pallas.grouped_matmul.mosaic_tpu import Tile as TpuTile
from kernels_pallas.grouped_matmul.visits import blocks, visits
from kernels_pallas.op import UnsupportedError
from kernels_pallas.rms_norm_quantize import quantize_rows
from tests.kernels_pallas import simulators
from tests.sparing import sparing

SIZES = st.lists(st.one_of(st.just(0), st.integers(0, 40)), min_size=1, max_size=7)


def owner_of_rows(sizes, rows):
    """The expert of every row; len(sizes) for padding."""
    owner = np.repeat(np.arange(len(sizes) + 1), [*sizes, rows])
    return owner[:rows]


def operands(sizes, rows, N=128, K=128, layers=0, seed=0):
    rng = np.random.default_rng(seed)
    lead = (layers, len(sizes)) if layers else (len(sizes),)
    x = jnp.asarray(rng.normal(size=(rows, K)), jnp.bfloat16)
    w = jnp.asarray(rng.normal(size=(*lead, N, K)) / K**0.5, jnp.bfloat16)
    return x, w, jnp.asarray(sizes, jnp.int32)


def by_hand(x, w, sizes):
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    y = np.zeros((x.shape[0], w.shape[1]))
    for row, expert in enumerate(owner_of_rows(sizes, x.shape[0])):
        if expert < len(sizes):
            y[row] = w[expert] @ x[row]
    return y


@pytest.mark.slow
@given(sizes=SIZES, padding=st.integers(0, 30), size=st.sampled_from([8, 16, 64]),
       align=st.sampled_from([1, 8]))  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_blocks_hold_every_row_once(sizes, padding, size, align):
    rows = max(1, sum(sizes) + padding)
    owner, seen = owner_of_rows(sizes, rows), np.zeros(rows, int)
    for group, start, count in zip(*blocks(jnp.asarray(sizes), rows, size, align), strict=True):
        mine = slice(int(start), int(start + count))
        seen[mine] += 1
        assert np.all(owner[mine] == group)
        assert not count or start % align + count <= size
    assert np.all(seen == 1)


planned = jax.jit(visits, static_argnums=(1, 2))


@given(sizes=SIZES, padding=st.integers(0, 30), size=st.sampled_from([8, 16, 64]))
@settings(max_examples=30, deadline=None)
def test_visits_meet_every_row_once(sizes, padding, size):
    rows = max(1, sum(sizes) + padding)
    plan = jax.tree.map(np.asarray, planned(jnp.asarray(sizes), rows, size))
    owner, seen = owner_of_rows(sizes, rows), np.zeros(rows, int)
    for block, group, weight in list(zip(plan.block, plan.group, plan.weight, strict=True))[
        : int(plan.used)
    ]:
        seen[block * size : (block + 1) * size][owner[block * size :][:size] == group] += 1
        assert not sum(sizes) or sizes[weight] > 0  # nothing is read for who is absent
    assert np.all(seen == 1)
    assert np.all(np.diff(plan.block) >= 0)  # a block is left once, or TPU would forget it


def test_more_rows_than_there_are():
    """Sizes that a caller got wrong do not reach past the array."""
    x, w, _ = operands([4, 4], 8)
    y = grouped_matmul.reference(x, w, jnp.asarray([6, 9], jnp.int32), out_dtype=jnp.float32)
    np.testing.assert_allclose(y, by_hand(x, w, [6, 2]), atol=1e-5)


@pytest.mark.parametrize("body", ["reference", "mosaic_tpu", "mosaic_gpu"])
@pytest.mark.parametrize(
    "sizes",
    sparing([[5, 0, 40, 0, 0, 19], [0, 0, 0], [70], [0, 0, 64], [1] * 9], [5, 0, 40, 0, 0, 19]),
    ids=str,
)
def test_rows_by_hand(body, sizes):
    rows = 72
    x, w, groups = operands(sizes, rows)
    tile = {"mosaic_tpu": TpuTile(block_m=32), "mosaic_gpu": GpuTile(16, 1, 64, 64, 2)}.get(body)
    interpret = simulators.gpu() if body == "mosaic_gpu" else True
    options = {} if tile is None else {"tile": tile, "interpret": interpret}
    y = grouped_matmul.run(body, x, w, groups, out_dtype=jnp.float32, **options)
    np.testing.assert_allclose(y, by_hand(x, w, sizes), atol=1e-5)


@pytest.mark.slow
@given(sizes=SIZES, padding=st.integers(0, 30))
@settings(max_examples=6, deadline=None)
def test_any_groups_on_tpu(sizes, padding):
    rows = max(1, sum(sizes) + padding)
    x, w, groups = operands(sizes, rows, K=256, layers=2)
    options = {"layer": jnp.int32(1), "out_dtype": jnp.float32}
    tile = TpuTile(block_m=32, block_k=128)
    found = grouped_matmul.run("mosaic_tpu", x, w, groups, tile=tile, interpret=True, **options)
    np.testing.assert_allclose(found, by_hand(x, w[1], sizes), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [64, 128])
def test_several_warpgroups_on_hopper(rows):
    sizes = [3, 0, 150, 20]
    x, w, groups = operands(sizes, 179, N=2 * rows, K=128)
    found = grouped_matmul.run(
        "mosaic_gpu", x, w, groups, tile=GpuTile(128, 2, rows, 64, 2),
        interpret=simulators.gpu(), out_dtype=jnp.float32,
    )  # fmt: skip
    np.testing.assert_allclose(found, by_hand(x, w, sizes), atol=1e-5)


def test_absent_experts_are_not_read():
    """A weight that is NaN changes nothing where its expert has no rows."""
    sizes = [5, 0, 40, 0]
    x, w, groups = operands(sizes, 50)
    w = w.at[jnp.asarray([1, 3])].set(jnp.nan)
    for body, interpret in (("mosaic_tpu", True), ("mosaic_gpu", simulators.gpu())):
        y = grouped_matmul.run(body, x, w, groups, interpret=interpret, out_dtype=jnp.float32)
        np.testing.assert_allclose(y, by_hand(x, jnp.nan_to_num(w), sizes), atol=1e-5)


@pytest.mark.parametrize("body", ["reference", "mosaic_tpu", "mosaic_gpu"])
def test_padding_is_zero_whatever_its_rows_hold(body):
    sizes = [5, 0, 30]
    interpret = simulators.gpu() if body == "mosaic_gpu" else True
    x, w, groups = operands(sizes, 48)
    (x8, x_scale), (w8, w_scale) = quantize_rows(x), quantize_rows(w)
    for rows, weight, scales in (
        (x.at[35:].set(jnp.nan), w, {}),
        (x8, w8, {"x_scale": x_scale.at[35:].set(jnp.nan), "w_scale": w_scale}),
    ):
        y = grouped_matmul.run(body, rows, weight, groups, interpret=interpret, **scales)
        assert np.all(np.asarray(y[35:]) == 0)
        assert np.all(np.isfinite(np.asarray(y[:35], np.float32)))
    for sizes in ([0, 0, 0], [0, 5, 0]):  # and whatever an expert holds that nobody asked
        scales = {"x_scale": x_scale, "w_scale": w_scale.at[0].set(jnp.nan)}
        y = grouped_matmul.run(body, x8, w8, jnp.asarray(sizes), interpret=interpret, **scales)
        assert np.all(np.asarray(y[sum(sizes) :]) == 0)
        assert np.all(np.isfinite(np.asarray(y, np.float32)))


def test_products_of_quantized_rows_are_close_to_those_of_the_rows():
    sizes = [5, 0, 11]
    x, w, groups = operands(sizes, 16, K=512)
    (x8, x_scale), (w8, w_scale) = quantize_rows(x), quantize_rows(w)
    found = grouped_matmul.reference(
        x8, w8, groups, x_scale=x_scale, w_scale=w_scale, out_dtype=jnp.float32
    )
    wanted = by_hand(x, w, sizes)
    assert np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2)) < 0.015


def test_what_is_refused():
    x, w, sizes = operands([4, 4], 8, K=96)
    with pytest.raises(UnsupportedError, match="K=96"):
        grouped_matmul.run("mosaic_tpu", x, w, sizes)
    with pytest.raises(UnsupportedError, match="K=96"):
        grouped_matmul.run("mosaic_gpu", x, w, sizes)
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), (x, w))
    with pytest.raises(UnsupportedError, match="float32"):
        grouped_matmul.run("mosaic_gpu", *wide, sizes)
    with pytest.raises(ValueError, match=r"int32\[2\]"):
        grouped_matmul.reference(x, w, sizes[:1])
    with pytest.raises(ValueError, match=r"\[L, E, N, K\]"):
        grouped_matmul.reference(x, w, sizes, layer=0)
    with pytest.raises(ValueError, match="x_scale is None"):
        grouped_matmul.reference(x.astype(jnp.int8), w.astype(jnp.int8), sizes)
    with pytest.raises(ValueError, match="scales go with int8"):
        grouped_matmul.reference(x, w, sizes, x_scale=jnp.ones(8))
