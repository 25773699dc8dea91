"""Experts on many devices answer as one device would, whatever axes hold experts and tokens."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from kernels_pallas.quantize import quantize_rows
from kernels_pallas.weight import Int8Weight, StackedWeight
from moe.dispatch import Dispatch
from moe.experts import Experts, experts, experts_on_rows
from moe.parallel import FarExperts, PlacedExperts
from moe.placement import ExpertLayout
from moe.transport import Transport

AXES = ("expert", "tensor")
E, A, D, F, L = 6, 2, 128, 64, 2


def draw(count, seed=0, layers=()):
    rng = np.random.default_rng(seed)

    def weight(*shape):
        return jnp.asarray(
            rng.normal(size=(*layers, count, *shape)) / shape[-1] ** 0.5, jnp.float32
        )

    return Experts(weight(F, D), weight(F, D), weight(D, F))


def rounded(p):
    def eight_bits(w):
        return Int8Weight(*quantize_rows(w))

    return Experts(eight_bits(p.w_gate), eight_bits(p.w_up), eight_bits(p.w_down))


def routed(T, seed=0):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(T, D)), jnp.float32)
    ids = jnp.asarray(np.argsort(rng.random((T, E)), -1)[:, :A], jnp.int32)
    return x, ids, jnp.asarray(rng.random((T, A)), jnp.float32)


def in_slots(p, placement):
    return jax.tree.map(lambda w: w[placement.expert_of], p)


def on_mesh(d, *, batch, replicated=(), stacked=False):
    """Parallel experts as a function of whole arrays; `batch` are the axes that split tokens."""
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), AXES)

    def run(x, ids, weights, p):
        if stacked:
            p = PlacedExperts(jax.tree.map(lambda w: StackedWeight(w, 1), p.weights), p.placement)
        return FarExperts(d, experts_on_rows, replicated)(x, ids, weights, p, activation="silu")

    tokens, slots = PartitionSpec(batch), PartitionSpec(*((None,) if stacked else ()), AXES)
    specs = (tokens, tokens, tokens, PlacedExperts(slots, PartitionSpec()))  # type: ignore[arg-type]
    return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=tokens, check_vma=False))


@pytest.mark.mesh
def test_many_devices_answer_as_one():
    layout = ExpertLayout(E, 8, 2)
    placement = layout.rebalance(np.array([9, 1, 1, 1, 1, 5]))
    d = Dispatch(layout, Transport(AXES, "ragged"), early_int8=False)
    p = draw(E)
    placed = PlacedExperts(in_slots(p, placement), placement)
    for T, batch, replicated in ((24, AXES, ()), (20, "expert", ("tensor",))):  # 5 tokens by 2
        x, ids, weights = routed(T)
        ids = ids.at[3].set(-1)
        found = on_mesh(d, batch=batch, replicated=replicated)(x, ids, weights, placed)
        wanted = experts(x, ids, weights, p, activation="silu")
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
        assert not np.any(found[3])


@pytest.mark.slow
@pytest.mark.mesh
def test_a_layer_of_a_stack():
    layout = ExpertLayout(E, 8, 1)
    placement = layout.initial()
    d = Dispatch(layout, Transport(AXES), early_int8=False)
    p = draw(E, layers=(L,))
    placed = PlacedExperts(jax.tree.map(lambda w: w[:, placement.expert_of], p), placement)
    x, ids, weights = routed(16)
    found = on_mesh(d, batch=AXES, stacked=True)(x, ids, weights, placed)
    wanted = experts(x, ids, weights, jax.tree.map(lambda w: w[1], p), activation="silu")
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.mesh
def test_a_shared_expert_joins_every_token():
    """Once, also if a router names it, who may not."""
    layout = ExpertLayout(E, 8, 1, shared_block=8)
    placement = layout.initial()
    d = Dispatch(layout, Transport(AXES, "ragged"), early_int8=False)
    p = draw(E + 1)
    x, ids, weights = routed(16)
    ids = ids.at[5, 0].set(E)
    placed = PlacedExperts(in_slots(p, placement), placement)
    found = on_mesh(d, batch=AXES)(x, ids, weights, placed)
    ids = jnp.concatenate([ids.at[5, 0].set(-1), jnp.full((16, 1), E, jnp.int32)], 1)
    weights = jnp.concatenate([weights, jnp.ones((16, 1), jnp.float32)], 1)
    wanted = experts(x, ids, weights, p, activation="silu")
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.mesh
def test_early_rounding_is_the_rounding_that_eight_bit_experts_do_anyway():
    """Answers in bfloat16 are the only difference, so their precision is the bound."""
    layout = ExpertLayout(E, 8, 1)
    placement = layout.initial()
    d = Dispatch(layout, Transport(AXES, "ragged"))
    p = rounded(draw(E))
    placed = PlacedExperts(in_slots(p, placement), placement)
    x, ids, weights = routed(16)
    found = on_mesh(d, batch=AXES)(x, ids, weights, placed)
    wanted = experts(x, ids, weights, p, activation="silu")
    exact = dataclasses.replace(d, early_int8=False)
    late = on_mesh(exact, batch=AXES)(x, ids, weights, placed)
    np.testing.assert_allclose(late, wanted, rtol=1e-5, atol=1e-6)
    assert np.abs(found - wanted).max() <= 2**-8 * np.abs(wanted).max()


@pytest.mark.parametrize("kind", ["float", "int8"])
@pytest.mark.parametrize("sizes", [[3, 0, 20, 1, 0, 2], [0] * 6, [0, 0, 40, 0, 0, 0]], ids=str)
def test_rows_by_expert_are_the_plain_product(kind, sizes):
    rng, R = np.random.default_rng(1), 40
    p = rounded(draw(E)) if kind == "int8" else draw(E)
    x = jnp.asarray(rng.normal(size=(R, D)), jnp.float32)
    owner = np.repeat(np.arange(E + 1), [*sizes, R - sum(sizes)])
    ones = jnp.ones((R, 1), jnp.float32)
    wanted = experts(x, jnp.asarray(owner[:, None], jnp.int32), ones, p, activation="silu")
    run = jax.jit(partial(experts_on_rows, activation="silu"))
    garbage = x.at[sum(sizes) :].set(jnp.nan)
    found = run(garbage, jnp.asarray(sizes, jnp.int32), p)
    total = sum(sizes)
    np.testing.assert_allclose(found[:total], wanted[:total], rtol=1e-5, atol=1e-6)
