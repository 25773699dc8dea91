"""The kernels of a TPU and of Hopper behind a model's operations, simulated on CPU."""

from __future__ import annotations

from functools import partial, partialmethod
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.cache.kv_cache import KVCache, allocate, stored_shape
from jaxserve.engine.serving_ops import sampling_ops, serving_ops
from jaxserve.models.family import family
from jaxserve.quant.weights import is_large, round_to_int8
from kernels_pallas.draw import draw
from kernels_pallas.op import Op
from kernels_pallas.paged_attention import Ragged
from kernels_pallas.quantize import quantize_rows
from kernels_pallas.target import Target
from kernels_pallas.weight import Int8Weight, StackedWeight
from moe.experts import Experts
from sharding.tree import initialise, is_weight, unstack
from tests.kernels_pallas import simulators
from tests.sparing import sparing

PAGE = 16
COMMON = {
    "vocab_size": 128, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
    "max_position_embeddings": 128, "torch_dtype": "bfloat16", "hidden_act": "silu",
}  # fmt: skip
MODELS = {
    "qwen3": {**COMMON, "model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 64},
    "qwen3_moe": {
        **COMMON, "model_type": "qwen3_moe", "num_key_value_heads": 2, "head_dim": 128,
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
        "norm_topk_prob": True, "mlp_only_layers": [],
    },
    "deepseek_v3": {
        **COMMON, "model_type": "deepseek_v3", "num_key_value_heads": 4, "q_lora_rank": None,
        "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64,
        "first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 128, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
        "norm_topk_prob": True, "routed_scaling_factor": 1.0, "scoring_func": "sigmoid",
        "topk_method": "noaux_tc", "attention_bias": False,
    },
}  # fmt: skip
TPU, GPU = Target("tpu", "v6e"), Target("gpu", "h200")
TARGETS = [
    pytest.param(TPU, id="tpu"),
    pytest.param(GPU, id="gpu", marks=pytest.mark.slow),  # seconds for each kernel
]


@pytest.fixture
def bodies(monkeypatch):
    """Simulates every body, and lists those that ran, without those that declined."""
    ran, run = [], Op.run

    def simulate(op, name, *args, **options):
        mode = {"mosaic_tpu": True, "mosaic_gpu": simulators.gpu()}.get(name, False)
        found = run(op, name, *args, interpret=mode, **options)
        ran.append((op.name, name))
        return found

    monkeypatch.setattr(Op, "run", partialmethod(simulate))
    return ran


def step(target: Target, kernels: str, num_rows: int = 9, dtype=jnp.bfloat16, batch=None):
    """One sequence decodes its 20th token, another has a chunk of prompt; padding follows."""
    starts = np.array([0, 1, num_rows, num_rows], np.int32)
    tables = np.array([[3, 1], [0, 2], [0, 0]], np.int32)
    lens = np.array([20, 8 + 4, 0], np.int32)
    batch = batch or Ragged(starts, lens, tables, np.array(2, np.int32))
    plan = SimpleNamespace(
        kernels=kernels, activation_dtype=dtype, target=target, on_mesh=False, notes_routes=False
    )
    return serving_ops(plan, jax.tree.map(jnp.asarray, batch), num_rows)


def weights(hf, quantization):
    module = family(hf["model_type"])
    cfg = module.config(hf)
    declared = module.declare_params(cfg)
    if cfg.router:  # XLA:CPU of jax 0.10 has no product of bfloat16 in a scan, which routing is
        declared = unstack(declared)
    params = initialise(declared, cfg.sizes, "bfloat16")
    if quantization:
        rounded = jax.tree.map(
            lambda w, a: round_to_int8(np.asarray(a, np.float32)) if is_large(w) else a,
            declared, params, is_leaf=is_weight,
        )  # fmt: skip
        kept = jax.tree.map(lambda a: jnp.asarray(a), rounded)
        params = jax.tree.map(
            lambda a: a.astype(jnp.bfloat16) if a.dtype == jnp.float32 and a.ndim > 3 else a, kept
        )
    return module, cfg, params


def kv(pages):
    return KVCache(*pages) if len(pages) == 2 else KVCache(pages[0], None)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("model", "quantization"),
    sparing(
        [("qwen3", "int8"), ("qwen3_moe", None), ("qwen3_moe", "int8"), ("deepseek_v3", None)],
        ("qwen3_moe", "int8"),
        ("deepseek_v3", None),
    ),
)
def test_a_step_equals_the_reference(model, quantization, target, bodies):
    module, cfg, params = weights(MODELS[model], quantization)
    rng = np.random.default_rng(0)
    heads, *lanes = cfg.kv_shape
    shapes = ((cfg.num_layers, 4, heads, PAGE, n) for n in lanes if n)
    pages = [jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes]
    padded = [
        jnp.pad(p, [(0, 0)] * 4 + [(0, n - p.shape[-1])])
        for p, n in zip(pages, stored_shape(cfg.kv_shape, target)[1:], strict=False)
    ]
    tokens = jnp.asarray(rng.integers(0, 128, (1, 16)), jnp.int32)
    at = jnp.asarray([[19, *range(4, 12), *[0] * 7]], jnp.int32)

    def run(ops, params, kv):
        return jax.jit(lambda *args: module.forward(cfg, *args[:3], ops, args[3]))(
            params, tokens, at, kv
        )

    hidden, after = run(step(target, "pallas"), params, kv(padded))
    assert bodies and all(name.startswith("mosaic") for op, name in bodies if op != "page_write")
    wide = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, params)
    expected, plain = run(step(target, "reference", dtype=jnp.float32), wide, kv(pages))
    scale = float(jnp.abs(expected[:, :9]).max())
    np.testing.assert_allclose(
        hidden[:, :9].astype(jnp.float32), expected[:, :9].astype(jnp.float32), atol=0.04 * scale
    )
    for x, y in zip(jax.tree.leaves(after), jax.tree.leaves(plain), strict=True):
        x, y = x.astype(jnp.float32)[..., : y.shape[-1]], y.astype(jnp.float32)
        np.testing.assert_allclose(x, y, atol=0.04 * float(jnp.abs(y).max()))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_a_step_over_pages_of_four_bits_runs_the_kernels(target, bodies, monkeypatch):
    """From blank pages, beside the same step with references for pages alone. Against a step in
    float32 both are off by .09: a nibble that falls otherwise is an eighth of a row's range."""
    module, cfg, params = weights(MODELS["qwen3"] | {"head_dim": 128}, None)
    lanes = stored_shape(cfg.kv_shape, target)
    shape = cfg.num_layers, 4, 128, lanes, jnp.dtype("int4"), None, cfg.key_parts
    pages = allocate(*shape, whole_scales=target is TPU)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 128, (1, 16)), jnp.int32)
    at = jnp.arange(16, dtype=jnp.int32)[None]
    starts, lens, tables, count = map(jnp.asarray, ([0, 9], [9], [[3, 1]], 1))
    ops = step(target, "pallas", batch=Ragged(starts, lens, tables, count))

    def run():
        return jax.jit(lambda p, kv: module.forward(cfg, p, tokens, at, ops, kv))(params, pages)

    hidden, kv = jax.block_until_ready(run())
    body = f"mosaic_{target.platform}"
    assert {("page_write", body), ("page_attention", body)} <= {*bodies}
    assert not any(body == "reference" for op, body in bodies if op.startswith("page"))
    simulated = Op.run

    def with_plain_pages(op, name, *args, **options):
        return simulated(op, "reference" if op.name.startswith("page") else name, *args, **options)

    monkeypatch.setattr(Op, "run", partialmethod(with_plain_pages))
    expected, plain = run()
    hidden, expected = (x[:, :9].astype(jnp.float32) for x in (hidden, expected))
    assert jnp.abs(hidden - expected).max() < 0.04 * jnp.abs(expected).max()
    for x, y in zip(jax.tree.leaves(kv), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(x[0], y[0])  # written before any attention


@pytest.mark.slow
@pytest.mark.parametrize("model", ["qwen3", "deepseek_v3"])
def test_a_step_over_pages_of_eight_bits_on_hopper_equals_the_reference(model, bodies):
    """From blank pages, in one step; both round what they write, so pages are nearly the same."""
    module, cfg, params = weights(MODELS[model], None)
    lanes = stored_shape(cfg.kv_shape, GPU)
    pages = allocate(cfg.num_layers, 4, 64, lanes, jnp.dtype("int8"), None, cfg.key_parts)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 128, (1, 16)), jnp.int32)
    at = jnp.arange(16, dtype=jnp.int32)[None]
    batch = Ragged(*map(jnp.asarray, ([0, 9], [9], [[3, 1]], 1)))

    def run(kernels, params, dtype):
        forward, ops = partial(module.forward, cfg), step(GPU, kernels, dtype=dtype, batch=batch)
        return jax.jit(lambda p, kv: forward(p, tokens, at, ops, kv))(params, pages)[0]

    try:
        hidden = jax.block_until_ready(run("pallas", params, jnp.bfloat16))
    finally:
        simulators.reset_gpu()
    ran = set(bodies)
    assert {("page_write", "mosaic_gpu"), ("page_attention", "mosaic_gpu")} <= ran
    assert not any(body == "reference" for op, body in ran if op.startswith("page"))
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), params)
    expected = run("reference", wide, jnp.float32)[:, :9]
    off = jnp.abs(hidden[:, :9].astype(jnp.float32) - expected).max()
    assert off < 0.04 * jnp.abs(expected).max()


def test_products_come_from_a_stack_of_layers(bodies):
    """`linear` of several weights and `gated_linear`, whose layer is known at run time."""
    rng = np.random.default_rng(0)
    stacks = [Int8Weight(*quantize_rows(normal(rng, 3, n, 128))) for n in (128, 256, 256)]
    x = normal(rng, 1, 16, 128).astype(jnp.bfloat16)

    def run(kernels, layer):
        ops = step(TPU, kernels)
        layers = [StackedWeight(stack, layer) for stack in stacks]
        y = *ops.linear(x, *layers), ops.gated_linear(x, *layers[1:], activation="silu")
        return [part.astype(jnp.float32) for part in y]

    found = jax.jit(run, static_argnums=0)("pallas", jnp.int32(2))
    assert bodies == [("int8_matmul", "mosaic_tpu")] * 4
    for y, expected in zip(found, run("reference", 2), strict=True):
        np.testing.assert_allclose(y, expected, atol=0.01 * float(jnp.abs(expected).max()))


def test_what_a_kernel_declines_is_computed_all_the_same(bodies):
    """96 inputs are no whole lanes: the reference does it."""
    rng = np.random.default_rng(0)
    w = Int8Weight(*quantize_rows(normal(rng, 128, 96)))
    x = normal(rng, 1, 16, 96)
    y = step(TPU, "pallas", dtype=jnp.float32).linear(x, w)
    assert bodies == [("int8_matmul", "reference")]
    np.testing.assert_allclose(y, step(TPU, "reference").linear(x, w), rtol=1e-5, atol=1e-5)


def test_rows_of_padding_reach_no_expert(bodies):
    rng = np.random.default_rng(0)
    mlps = Experts(*(normal(rng, 4, 128, 128).astype(jnp.bfloat16) for _ in range(3)))
    x = normal(rng, 16, 128).astype(jnp.bfloat16).at[9:].set(jnp.nan)
    ids = jnp.asarray(rng.integers(0, 4, (16, 2)), jnp.int32)
    y = step(TPU, "pallas").experts(x, ids, jnp.ones((16, 2)), mlps, activation="silu")
    assert jnp.isfinite(y[:9]).all() and bodies == [("grouped_matmul", "mosaic_tpu")] * 3


def test_tokens_are_drawn_by_the_kernel(bodies):
    rng = np.random.default_rng(0)
    scores, u = normal(rng, 5, 300), jnp.asarray(rng.random(5), jnp.float32)
    rest = jnp.ones(5), jnp.full(5, 20, jnp.int32), jnp.full(5, 0.9), jnp.zeros(5)
    plan = SimpleNamespace(kernels="pallas", target=TPU)
    tokens = sampling_ops(plan, jnp.int32(5))["draw"](scores, u, *rest)
    assert bodies == [("sample", "mosaic_tpu")]
    np.testing.assert_array_equal(tokens, draw(scores, u, *rest))


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)
