"""Tokens reach their experts and come back exactly, whatever the way and the placement."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from moe import wire
from moe.dispatch import Dispatch, arrived, combine, reply, send
from moe.placement import ExpertLayout
from moe.transport import Transport
from tests.kernels_pallas import simulators
from tests.moe.routing import answers, oracle, routings

AXES = ("expert", "tensor")
SPLIT, WHOLE = PartitionSpec(AXES), PartitionSpec()
T, A, D = 5, 3, 128


@functools.cache
def mesh(devices=8):
    return Mesh(np.array(jax.devices()[:devices]).reshape(-1, 2), AXES)


@functools.cache
def program(d):
    """There, `answers` and combine on every device; also how many rows each slot had."""

    def run(x, ids, weights, placement, num_rows):
        came, receipt = send(d, x[0], ids[0], placement, num_rows[0])
        rows, sizes = arrived(d, came, receipt)
        rows = rows.dequantized() if d.early_int8 else rows
        me, slots = lax.axis_index(AXES), d.layout.slots_per_device
        mine = lax.dynamic_slice_in_dim(placement.expert_of, me * slots, slots)
        y = combine(reply(d, answers(rows, sizes, mine), receipt), receipt, weights[0])
        return y[None], sizes

    specs = {"in_specs": (SPLIT, SPLIT, SPLIT, WHOLE, SPLIT), "out_specs": (SPLIT, SPLIT)}
    return jax.jit(jax.shard_map(run, mesh=mesh(d.layout.num_devices), check_vma=False, **specs))


def drawn(layout, seed, tokens=T):
    """Small integers, whose sums and products are exact."""
    rng = np.random.default_rng(seed)
    shape = (layout.num_devices, tokens)
    x = rng.integers(-9, 10, (*shape, D)).astype(np.float32)
    placement = layout.rebalance(rng.zipf(1.3, layout.num_experts).clip(0, 99))
    return x, rng.integers(1, 5, (*shape, A)).astype(np.float32), placement


def check(d, ids, seed, num_rows=None):
    layout = d.layout
    x, weights, placement = drawn(layout, seed, ids.shape[1])
    rows = np.full(layout.num_devices, ids.shape[1]) if num_rows is None else num_rows
    y, sizes = program(d)(x, ids, weights, placement, rows.astype(np.int32))
    E = layout.num_experts + layout.num_shared
    ids = np.where(np.arange(ids.shape[1])[:, None] < rows[:, None, None], ids, -1)
    np.testing.assert_array_equal(y, oracle(x, ids, weights, E))
    got = np.bincount(placement.expert_of, sizes, minlength=E)
    np.testing.assert_array_equal(got, np.bincount(ids[(ids >= 0) & (ids < E)], minlength=E))


def transports():
    """Every way, and of "padded" one that needs several rounds."""
    simulated = simulators.tpu()
    return {
        "padded": Transport(AXES, "padded", capacity_factor=0.5),
        "roomy": Transport(AXES, "padded", capacity_factor=9.0),
        "ragged": Transport(AXES, "ragged"),
        "push": Transport(AXES, "push", interpret=simulated),
    }


@pytest.mark.mesh
@pytest.mark.parametrize(
    ("way", "devices", "examples"),
    [("padded", 8, 20), ("ragged", 8, 20), pytest.param("push", 4, 4, marks=pytest.mark.slow)],
)
def test_tokens_are_conserved_and_answers_exact(way, devices, examples):
    """Two slots a device and a shared expert, over two axes, under every kind of routing."""
    layout = ExpertLayout(5, devices, 2, shared_block=4)
    d = Dispatch(layout, transports()[way], early_int8=False)
    num_rows = st.lists(st.integers(0, T), min_size=devices, max_size=devices).map(np.array)

    @given(routings(devices, T, A, 6), num_rows, st.integers(0, 99))
    @settings(max_examples=examples, deadline=None)
    def run(ids, num_rows, seed):
        check(d, ids, seed, num_rows)
        assert way != "push" or not simulators.tpu_races_found()

    run()


@pytest.mark.slow
@pytest.mark.mesh
def test_bits_depend_neither_on_the_way_nor_on_the_placement():
    layout = ExpertLayout(6, 8, 2, shared_block=4)
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(8, T, D)), rng.random((8, T, A))
    ids = np.argsort(rng.random((8, T, 7)), -1)[..., :A].astype(np.int32)
    rows = np.full(8, T, np.int32)
    for early_int8 in (False, True):
        found = [
            np.asarray(
                program(Dispatch(layout, transport, early_int8))(
                    x.astype(np.float32), ids, weights.astype(np.float32), placement, rows
                )[0]
            )
            for transport in transports().values()
            for placement in (layout.initial(), layout.rebalance(np.array([90, 1, 1, 1, 1, 50])))
        ]
        assert np.abs(found[0]).max() > 1
        for other in found[1:]:
            np.testing.assert_array_equal(found[0], other)


@pytest.mark.slow
@pytest.mark.mesh
def test_an_expert_named_twice_answers_once():
    layout = ExpertLayout(8, 8, 1)
    d = Dispatch(layout, Transport(AXES), early_int8=False)
    ids = np.full((8, T, A), 3, np.int32)
    x, weights, placement = drawn(layout, 0)
    y, sizes = program(d)(x, ids, weights, placement, np.full(8, T, np.int32))
    np.testing.assert_array_equal(y, x * 4 * weights[..., :1])
    assert sizes.sum() == 8 * T


def test_rows_on_the_wire_are_values_and_a_padded_scale():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 7168)), jnp.bfloat16)
    rows = wire.pack(x)
    assert rows.shape == (4, 7680) and rows.dtype == jnp.int8
    assert wire.row_bytes(7168) == 7680
    back = wire.unpack(rows)
    step = np.abs(x.astype(jnp.float32)).max(1, keepdims=True) / 127
    assert np.all(np.abs(back.dequantized() - x.astype(jnp.float32)) <= step * 0.51)
    assert not np.any(rows[:, 7172:])


def test_ways_and_capacities_are_named_in_refusals():
    with pytest.raises(ValueError, match="way='carrier pigeon' is none of padded, ragged"):
        Transport(AXES, "carrier pigeon")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="capacity_factor=0 must be positive"):
        Transport(AXES, capacity_factor=0)


@pytest.mark.mesh(10)
def test_ep10_is_ep320_at_a_thirty_second():
    """8 routed, 1 redundant and 1 shared expert, each on a device of its own."""
    layout = ExpertLayout(8, 10, 1, shared_block=10)
    assert layout.num_redundant == 1
    d = Dispatch(layout, Transport(AXES, "ragged"), early_int8=False)

    @given(routings(10, T, A - 1, 8), st.integers(0, 99))
    @settings(max_examples=10, deadline=None)
    def run(ids, seed):
        shared = np.full((10, T, 1), 8, np.int32)
        check(d, np.concatenate([np.where(ids < 8, ids, -1), shared], -1), seed)

    run()


@pytest.mark.slow
@pytest.mark.mesh(10)
@pytest.mark.parametrize("way", ["padded", "push"])
def test_everybody_at_the_shared_expert_of_ep10(way):
    d = Dispatch(ExpertLayout(8, 10, 1, shared_block=10), transports()[way], early_int8=False)
    all_to_shared = np.where(np.arange(A) == 0, 8, -1) * np.ones((10, T, 1), np.int32)
    check(d, all_to_shared, 0)
    assert way != "push" or not simulators.tpu_races_found()
