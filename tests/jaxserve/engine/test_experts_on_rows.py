"""Kernels over rows that come sorted by expert, as a dispatch delivers them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import kernels_pallas.cpu as cpu
from jaxserve.engine import native_ops, pallas_ops
from kernels_pallas.quantize import Int8Rows, quantize_rows
from kernels_pallas.target import CPU, Target
from kernels_pallas.weight import Int8Weight, StackedWeight
from moe.experts import Experts, experts_on_rows
from sharding import compile_only

E, D, F, R = 5, 256, 128, 48


def compiled(run):
    return jax.jit(partial(run, activation="silu"))


REFERENCE = compiled(experts_on_rows)
KERNELS = [
    pytest.param(
        compiled(native_ops.experts_on_rows),
        marks=pytest.mark.skipif(not cpu.available(), reason="no C++ compiler"),
        id="native",
    ),
    pytest.param(compiled(partial(pallas_ops.experts_on_rows, CPU)), id="pallas"),
]


def draw(rounded):
    """The second of two layers' experts."""
    rng = np.random.default_rng(0)

    def weight(*shape):
        w = jnp.asarray(rng.normal(size=(2, E, *shape)) / shape[-1] ** 0.5, jnp.float32)
        return StackedWeight(Int8Weight(*quantize_rows(w)) if rounded else w, jnp.int32(1))

    return Experts(weight(F, D), weight(F, D), weight(D, F))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("sizes", [[4, 0, 20, 1, 7], [0, 0, 48, 0, 0], [0] * E], ids=str)
def test_rows_meet_their_experts(kernels, rounded, sizes):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(R, D)), jnp.float32)
    total, counts, p = sum(sizes), jnp.asarray(sizes, jnp.int32), draw(rounded)
    for rows in (x, Int8Rows(*quantize_rows(x))):
        found = kernels(rows, counts, p)[:total]
        wanted = REFERENCE(rows, counts, p)[:total]
        # rows of eight bits answer in bfloat16, and hidden ones are rounded to it first
        coarse = isinstance(rows, Int8Rows) and found.dtype == jnp.bfloat16
        error = np.abs(found.astype(jnp.float32) - wanted).max(initial=0)
        assert error <= (0.02 if coarse else 1e-3) * np.abs(wanted).max(initial=1e-9)


@pytest.mark.slow
@pytest.mark.aot
@pytest.mark.usefixtures("no_compilation_cache")
@pytest.mark.parametrize("target", ["v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_compiles_for_absent_tpus_without_copies_of_weights(target):
    mesh = compile_only.mesh(target)
    sharding = NamedSharding(mesh, PartitionSpec())

    def shape(*sizes, dtype=jnp.int8):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    def weight(*sizes):
        w = Int8Weight(shape(4, 9, *sizes), shape(4, 9, sizes[0], dtype=jnp.float32))
        return StackedWeight(w, shape(dtype=jnp.int32))

    p = Experts(weight(2048, 7168), weight(2048, 7168), weight(7168, 2048))
    rows = Int8Rows(shape(1024, 7168), shape(1024, dtype=jnp.float32))
    run = partial(pallas_ops.experts_on_rows, Target.of(mesh), activation="silu")
    program = jax.jit(run).lower(rows, shape(9, dtype=jnp.int32), p).compile()
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == 3
    one_layer = 9 * 2048 * 7168
    assert program.memory_analysis().temp_size_in_bytes < one_layer
