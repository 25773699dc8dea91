"""Gradients flow through what is served: native kernels and the paged cache, on real rows."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas.cpu as cpu
from jaxserve.cache.kv_cache import KVCache
from jaxserve.engine.serving_ops import serving_ops
from jaxserve.models import deepseek_v3, qwen3_moe
from jaxserve.models.attention import packed
from jaxserve.models.ops import Ops
from kernels_pallas.paged_attention import Ragged
from kernels_pallas.weight import StackedWeight
from moe.experts import Experts
from sharding.tree import initialise
from tests.jaxserve.train import runs
from tests.sparing import sparing

KERNELS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(not cpu.available(), reason="no C++ compiler")),
]
ROWS = 6


def ops(kernels, before=0):
    """For a step with one sequence of `ROWS` tokens, and as many more in its pages as `before`."""
    starts, lens = jnp.array([0, ROWS, ROWS], jnp.int32), jnp.array([before + ROWS, 0], jnp.int32)
    tables = jnp.arange(8, dtype=jnp.int32).reshape(2, 4)
    plan = SimpleNamespace(
        kernels=kernels, activation_dtype=jnp.float32, on_mesh=False, notes_routes=False
    )
    return serving_ops(plan, Ragged(starts, lens, tables, jnp.int32(1)), ROWS)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def angles(*shape):
    turn = normal(9, *shape)
    return jnp.cos(turn), jnp.sin(turn)


IDS = jnp.array([[0, 2], [1, 0], [2, 1], [0, 1], [2, 0], [1, 2]], jnp.int32)

CASES = {
    "linear": (lambda o, x, w: o.linear(x, w), (normal(0, 1, ROWS, 8), normal(1, 5, 8))),
    "linear from a stack": (
        lambda o, x, w: o.linear(x, StackedWeight(w, jnp.int32(1))),
        (normal(0, 1, ROWS, 8), normal(1, 3, 5, 2, 8)),
    ),
    "gated linear": (
        lambda o, x, g, u: o.gated_linear(x, g, u, activation="silu"),
        (normal(0, 1, ROWS, 8), normal(1, 5, 8), normal(2, 5, 8)),
    ),
    "norm": (
        lambda o, x, s: o.rms_norm(x, s, eps=1e-6, offset=1.0),
        (normal(0, 1, ROWS, 8), normal(1, 8)),
    ),
    "rotate": (
        lambda o, x: o.rotate(x, angles(1, ROWS, 1, 4), interleaved=True),
        (normal(0, 1, ROWS, 2, 8),),
    ),
    "experts": (
        lambda o, x, w, g, u, d: o.experts(x, IDS, w, Experts(g, u, d), activation="silu"),
        (normal(0, ROWS, 8), normal(1, ROWS, 2), normal(2, 3, 5, 8), normal(3, 3, 5, 8),
         normal(4, 3, 8, 5)),
    ),
    "attention": (
        lambda o, q, k, v, k_pages, v_pages, sinks: o.attend(
            q, k, v, KVCache(k_pages, v_pages), 1, scale=0.5, window=4, sinks=sinks, soft_cap=3.0
        )[0],
        (normal(0, 1, ROWS, 4, 8), normal(1, 1, ROWS, 2, 8), normal(2, 1, ROWS, 2, 8),
         normal(3, 2, 8, 2, 4, 8), normal(4, 2, 8, 2, 4, 8), normal(5, 4)),
    ),
    "latent attention": (
        lambda o, q, k, k_pages: o.attend(
            q, k, None, KVCache(k_pages, None), 0, scale=0.5, value_dim=5
        )[0],
        (normal(0, 1, ROWS, 4, 8), normal(1, 1, ROWS, 1, 8), normal(3, 1, 8, 1, 4, 8)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("case", sparing(CASES, "linear", "norm", "latent attention"))
def test_gradients_are_the_slopes_of_the_kernel(case, kernels):
    """Along random directions of every argument, by central differences of the kernel itself."""
    op, args = CASES[case]

    @jax.jit
    def value(*args):
        y = op(ops(kernels, before=2), *args)
        return (y * normal(7, *y.shape)).sum()

    gradients = jax.jit(jax.grad(value, range(len(args))))(*args)
    for i, g in enumerate(gradients):
        along = normal(20 + i, *args[i].shape)
        step = 1e-2

        def moved(by, i=i, along=along):
            return value(*args[:i], args[i] + by * along, *args[i + 1 :])

        slope = (moved(step) - moved(-step)) / (2 * step)
        size = float(jnp.abs(g * along).sum())
        assert size > 0.1
        np.testing.assert_allclose((g * along).sum(), slope, atol=3e-3 * size)


@pytest.mark.parametrize("kernels", sparing(KERNELS, KERNELS[1]))
@pytest.mark.parametrize(
    ("family", "hf"), [(qwen3_moe, runs.QWEN3_MOE), (deepseek_v3, runs.DEEPSEEK_V3)]
)
def test_a_served_step_has_the_gradient_of_training(family, hf, kernels):
    """The same loss over the paged cache as over packed documents, for every weight."""
    cfg = family.config({**hf, "vocab_size": 32})
    params = initialise(family.declare_params(cfg), cfg.sizes, "float32")
    tokens, at = jnp.arange(3, 3 + ROWS)[None], jnp.arange(ROWS)[None]
    heads, key, value = cfg.kv_shape
    pages = [
        jnp.zeros((cfg.num_layers, 8, heads, 4, lanes)) if lanes else None for lanes in (key, value)
    ]

    def loss(params, ops, kv):
        x, _ = family.forward(cfg, params, tokens, at, ops, kv)
        scores = family.logits(cfg, params, x, ops)
        return -jnp.take_along_axis(jax.nn.log_softmax(scores), tokens[..., None] + 1, -1).mean()

    served = jax.jit(jax.grad(lambda p: loss(p, ops(kernels), KVCache(*pages))))(params)
    train = Ops(attend=packed(jnp.ones_like(tokens), at), dtype=jnp.float32)
    trained = jax.jit(jax.grad(lambda p: loss(p, train, None)))(params)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(served), jax.tree.leaves(trained), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=2e-5, err_msg=jax.tree_util.keystr(path))
