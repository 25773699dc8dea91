"""Collectives on eight CPU devices, against numpy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sharding import collectives
from sharding.hardware import named
from sharding.hlo import collectives_of
from sharding.mesh import Parallelism, mesh

pytestmark = pytest.mark.mesh
GROUP = ("expert", "tensor")
N = 8


def on_mesh(f, *arrays):
    """f inside of shard_map over (1, 4, 2) devices, every array split along its first axis."""
    there = mesh(Parallelism(data=4, expert=8, tensor=2), named("cpu:8"))
    specs = (P(GROUP),) * len(arrays)
    return jax.jit(
        jax.shard_map(f, mesh=there, in_specs=specs, out_specs=P(GROUP), check_vma=False)
    ).lower(*arrays)


def test_all_to_all_over_two_axes_is_one_group():
    x = np.arange(N * N * 3, dtype=np.int8).reshape(N * N, 3)
    compiled = on_mesh(partial(collectives.all_to_all, axes=GROUP), x).compile()
    expected = x.reshape(N, N, 3).swapaxes(0, 1).reshape(N * N, 3)
    np.testing.assert_array_equal(compiled(x), expected)
    (found,) = collectives_of(compiled.as_text())
    assert (found.kind, found.dtype, found.num_bytes, found.group_size) == (
        "all-to-all", "s8", N * 3, N,
    )  # fmt: skip


def test_tokens_become_heads_and_back():
    x = np.random.default_rng(0).standard_normal((16, 4, 3)).astype(np.float32)  # [T, N, H]

    def heads(x):  # [T/8, N, H] -> [T/4, N/2, H] within a pair
        return collectives.all_to_all(x, "tensor", split=1, concat=0)

    there = on_mesh(heads, x).compile()(x)
    pairs = x.reshape(4, 4, 2, 2, 3)  # pair, its tokens, which half of the heads
    np.testing.assert_array_equal(there, pairs.swapaxes(1, 2).reshape(32, 2, 3))
    back = on_mesh(lambda x: collectives.all_to_all(heads(x), "tensor", split=0, concat=1), x)
    np.testing.assert_array_equal(back.compile()(x), x)


def test_gather_and_reduce_scatter_and_shift():
    x = np.random.default_rng(1).standard_normal((N * 2, 5)).astype(np.float32)
    gathered = on_mesh(partial(collectives.all_gather, axes=GROUP), x).compile()(x)
    np.testing.assert_array_equal(gathered, np.tile(x, (N, 1)))
    whole = np.random.default_rng(2).standard_normal((N * N, 5)).astype(np.float32)
    summed = on_mesh(partial(collectives.reduce_scatter, axes=GROUP), whole).compile()(whole)
    np.testing.assert_allclose(summed, whole.reshape(N, N, 5).sum(0), rtol=1e-5)
    for by in (1, 3, -1):
        shifted = on_mesh(partial(collectives.ring_shift, axis=GROUP, by=by), x).compile()(x)
        np.testing.assert_array_equal(shifted, np.roll(x.reshape(N, 2, 5), by, 0).reshape(x.shape))


@pytest.mark.parametrize("rows", [0, 3, 40])
def test_ragged_all_to_all_moves_what_is_counted(rows: int):
    rng = np.random.default_rng(rows)
    size = rng.multinomial(rows, np.ones(N) / N, N).astype(np.int32)  # [from, to]
    capacity = rows + 2
    first = np.cumsum(size, 1, dtype=np.int32) - size
    start = np.cumsum(size, 0, dtype=np.int32) - size + 1  # a row is left free before all
    landing = int(size.sum(0).max()) + 2
    x = rng.standard_normal((N, capacity, 4)).astype(np.float32)
    out = np.full((N, landing, 4), -1, np.float32)
    expected = out.copy()
    for a in range(N):
        for b in range(N):
            rows_sent = x[a, first[a, b] : first[a, b] + size[a, b]]
            expected[b, start[a, b] : start[a, b] + size[a, b]] = rows_sent

    def send(*arrays):
        one = [a[0] for a in arrays]
        sent = collectives.ragged_all_to_all(*one, axes=GROUP, platform="cpu")
        return sent[None]

    arrays = x, out, first, size, start, size.T.copy()
    np.testing.assert_array_equal(on_mesh(send, *arrays).compile()(*arrays), expected)


def test_ragged_all_to_all_can_be_differentiated():
    size = np.ones((N, N), np.int32)
    place = np.tile(np.arange(N, dtype=np.int32), (N, 1))
    start = place.T.copy()
    x = np.random.default_rng(0).standard_normal((N, N)).astype(np.float32)

    def loss(x, place, size, start):
        def scaled(x):
            sent = collectives.ragged_all_to_all(
                x, jnp.zeros_like(x), place, size, start, size, GROUP, platform="cpu"
            )
            return jnp.sum(sent * jnp.arange(1.0, N + 1))

        return jax.grad(scaled)(x)

    arrays = x.reshape(-1), place.reshape(-1), size.reshape(-1), start.reshape(-1)
    gradient = on_mesh(loss, *arrays).compile()(*arrays)
    # What device a sends to b lands in row a there, whose weight is a + 1.
    np.testing.assert_array_equal(gradient, np.repeat(np.arange(1.0, N + 1), N))
