"""Experts change their slots without a compilation, and load is what makes them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels_pallas.quantize import quantize_rows
from kernels_pallas.weight import Int8Weight
from moe.load import add_load, no_load
from moe.moving import move, sources
from moe.placement import ExpertLayout
from moe.transport import Transport
from tests.sparing import sparing

AXES = ("expert", "tensor")
L, F, D = 2, 6, 128


def layout_of(num_experts=6):
    return ExpertLayout(num_experts, 8, 2, shared_block=4)


def experts_in(layout, placement):
    """A weight of eight bits and one of floats, by slot: [L, S, ...]."""
    rng = np.random.default_rng(0)
    E = layout.num_experts + layout.num_shared
    tree = {
        "rounded": Int8Weight(*quantize_rows(jnp.asarray(rng.normal(size=(L, E, F, D))))),
        "float": jnp.asarray(rng.normal(size=(L, E, D, F)), jnp.bfloat16),
    }

    def by_slot(w):
        return np.stack([np.asarray(w)[i, placement.expert_of[i]] for i in range(L)])

    return jax.tree.map(by_slot, tree)


@pytest.mark.mesh
@pytest.mark.parametrize("way", sparing(["padded", "ragged"], "ragged"))
def test_experts_move_to_any_placement_with_one_program(way):
    layout, transport = layout_of(), Transport(AXES, way)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), AXES)
    slots = PartitionSpec(None, AXES)

    @partial(jax.jit, donate_argnums=0)
    def moved(weights, source):
        here = partial(move, transport, layout)
        how = {"mesh": mesh, "in_specs": (slots, PartitionSpec()), "out_specs": slots}
        return jax.shard_map(here, **how, check_vma=False)(weights, source)

    old = layout.initial(L)
    weights = jax.device_put(experts_in(layout, old), NamedSharding(mesh, slots))
    for seed in range(3):
        load = np.random.default_rng(seed).zipf(1.3, (L, layout.num_experts)).clip(0, 99)
        new = layout.rebalance(load)
        before = weights["float"]
        weights = moved(weights, sources(layout, old, new))
        assert before.is_deleted()  # its memory is the new weight's
        jax.tree.map(np.testing.assert_array_equal, weights, experts_in(layout, new))
        old = new
    assert moved._cache_size() == 1  # type: ignore[attr-defined]


def test_what_can_stay_stays():
    layout = layout_of()
    old = layout.initial()
    np.testing.assert_array_equal(sources(layout, old, old), np.arange(layout.num_slots))
    new = layout.rebalance(np.array([90, 1, 1, 1, 1, 1]), old)
    source = sources(layout, old, new)
    np.testing.assert_array_equal(old.expert_of[source], new.expert_of)
    kept = old.expert_of == new.expert_of
    np.testing.assert_array_equal(source[kept], np.flatnonzero(kept))
    device = np.arange(layout.num_slots) // 2
    for slot, expert in enumerate(new.expert_of):
        at_home = expert in old.expert_of[device == device[slot]]
        assert (source[slot] // 2 == device[slot]) == at_home


def test_load_is_the_choices_of_real_tokens():
    rng = np.random.default_rng(0)
    ids = rng.integers(-1, 6, (3, 7, 2)).astype(np.int32)  # 3 devices; -1 and 5 are no experts
    rows = [7, 3, 0]
    count = jax.jit(partial(add_load, layer=1))
    devices = [count(no_load(2, 5), ids=i, num_rows=n) for i, n in zip(ids, rows, strict=True)]
    real = np.concatenate([i[:n].reshape(-1) for i, n in zip(ids, rows, strict=True)])
    wanted = np.bincount(real[(real >= 0) & (real < 5)], minlength=5)
    np.testing.assert_array_equal(sum(devices), [np.zeros(5), wanted])
