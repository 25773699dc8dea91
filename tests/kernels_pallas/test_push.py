"""Rows pushed to other devices all arrive, in order; two landing blocks are what that takes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels_pallas.op import UnsupportedError
from kernels_pallas.push import Tile, push
from sharding import compile_only
from tests.kernels_pallas import simulators
from tests.sparing import sparing

AXES = ("data", "expert", "tensor")
N, W, K = 4, 256, 2  # devices that exchange
SPLIT = PartitionSpec(AXES)


def counts_of(kind, groups):
    """[groups, N, N, K]: rows from each device to each."""
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 3, (groups, N, N, K))
    if kind == "one":  # all that there is, to one
        counts[:, :, :2] = 0
        counts[:, :, 3] = 0
    elif kind == "lopsided":  # a stream one way, nothing back
        counts[:] = 0
        counts[:, 0, 3], counts[:, 2, 1] = (5, 4), (1, 0)
    elif kind == "streams":
        counts += rng.integers(0, 7, counts.shape)
    elif kind == "none":
        counts[:] = 0
    return counts.astype(np.int32)


@functools.cache
def program(groups, num_out, num_blocks):
    """Rows between "expert" and "tensor", for each value of "data"."""
    mesh = Mesh(np.array(jax.devices()[: groups * N]).reshape(groups, 2, 2), AXES)

    def run(rows, counts):
        options = {"tile": Tile(4, num_blocks), "interpret": simulators.tpu()}
        found, theirs = push(rows[0], counts[0], num_out, axes=AXES[1:], **options)
        return found[None], theirs[None]

    specs = {"in_specs": (SPLIT, SPLIT), "out_specs": (SPLIT, SPLIT)}
    return jax.jit(jax.shard_map(run, mesh=mesh, check_vma=False, **specs))


def pushed(counts, num_blocks=2, dtype=np.int8):
    most = 64
    groups = len(counts)
    rows = np.random.default_rng(1).integers(-99, 99, (groups, N, most, W)).astype(dtype)
    flat = rows.reshape(-1, most, W), counts.reshape(-1, N, K)
    found, theirs = program(groups, most, num_blocks)(*flat)
    return rows, np.asarray(found).reshape(rows.shape), np.asarray(theirs).reshape(counts.shape)


@pytest.mark.mesh
@pytest.mark.parametrize(
    ("groups", "dtype"), sparing([(1, np.int8), (2, jnp.bfloat16)], (1, np.int8)), ids=str
)
def test_rows_arrive_in_order_and_without_races(groups, dtype):
    for kind in ("few", "one", "lopsided", "streams", "none"):
        counts = counts_of(kind, groups)
        rows, found, theirs = pushed(counts, dtype=dtype)
        assert not simulators.tpu_races_found(), kind
        np.testing.assert_array_equal(theirs, counts.swapaxes(1, 2))
        sizes = counts.sum(-1)
        first = np.cumsum(sizes, 2) - sizes
        for group, me in np.ndindex(groups, N):
            runs = [rows[group, j, first[group, j, me] :][: sizes[group, j, me]] for j in range(N)]
            wanted = np.concatenate(runs)
            np.testing.assert_array_equal(found[group, me, : len(wanted)], wanted)


@pytest.mark.slow
@pytest.mark.mesh
def test_one_landing_block_is_a_race():
    pushed(counts_of("streams", 1), num_blocks=1)
    assert simulators.tpu_races_found()


def test_odd_widths_are_refused():
    with pytest.raises(UnsupportedError, match="rows of 100 entries"):
        push(jnp.zeros((4, 100)), jnp.zeros((1, 1), jnp.int32), 4, axes=("x",))


@pytest.mark.aot
@pytest.mark.usefixtures("no_compilation_cache")
@pytest.mark.parametrize("target", ["v5p:2x2x2", "v6e:2x4", "tpu7x:2x2x1"])
def test_compiles_for_absent_tpus(target):
    """A token of DeepSeek-V3 to its expert, in eight bits, and its answer, in bfloat16."""
    mesh = compile_only.mesh(target, (1, 4, 2), AXES)
    for width, dtype in ((7680, jnp.int8), (7168, jnp.bfloat16)):

        def run(rows, counts):
            found, theirs = push(rows[0], counts[0], 8 * 96, axes=AXES[1:])
            return found[None], theirs[None]

        specs = {"in_specs": (SPLIT, SPLIT), "out_specs": (SPLIT, SPLIT)}
        step = jax.jit(jax.shard_map(run, mesh=mesh, check_vma=False, **specs))
        args = (
            jax.ShapeDtypeStruct(shape, kind, sharding=NamedSharding(mesh, SPLIT))
            for shape, kind in (((8, 96, width), dtype), ((8, 8, 1), jnp.int32))
        )
        text = step.lower(*args).compile().as_text()
        name = "s8" if dtype == jnp.int8 else "bf16"
        assert f"{name}[768,{width // 128},128]" in text and "tpu_custom_call" in text
