"""A step's programs lower for hardware that is not here: nothing in them asks for a platform."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxserve.config import EngineConfig
from jaxserve.engine.signature import program
from jaxserve.models.family import family
from jaxserve.plan import Plan, resolve
from sharding.tree import abstract, unstack
from tests.sparing import sparing

HF = {
    "model_type": "qwen3_moe", "vocab_size": 256, "hidden_size": 128, "intermediate_size": 128,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True,
    "torch_dtype": "bfloat16", "mlp_only_layers": [0],
}  # fmt: skip
KINDS = {"tpu": "TPU v6 lite", "cuda": "NVIDIA H200"}
KERNEL = {"tpu": "tpu_custom_call", "cuda": "mosaic_gpu_v2"}


class AbsentDevice:
    """As much of an accelerator as a plan asks of it."""

    def __init__(self, platform: str):
        self.platform, self.device_kind = platform, KINDS[platform]

    def memory_stats(self) -> dict[str, int]:
        return {"bytes_limit": 16 << 30, "bytes_in_use": 0}


def planned(platform: str, kernels: str) -> tuple[Plan, object]:
    cfg = family("qwen3_moe").config(HF)
    config = EngineConfig(
        max_num_seqs=8, max_num_batched_tokens=32, kernels=kernels, decode_steps=2
    )
    plan = resolve(config, HF, cfg, lambda *_: 2_000_000, AbsentDevice(platform))
    return dataclasses.replace(plan, num_pages=16, refines=True), cfg


@pytest.mark.parametrize("kernels", sparing(["auto", "reference"], "auto"))
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_programs_lower_for_absent_hardware(platform: str, kernels: str) -> None:
    plan, cfg = planned(platform, kernels)
    assert plan.dtype == jnp.bfloat16
    assert plan.kernels == ("pallas" if kernels == "auto" else kernels)
    lanes = 128 if (platform, kernels) == ("tpu", "auto") else 64
    assert plan.kv_shape == (2, lanes, lanes)
    module = family("qwen3_moe")
    declared = module.declare_params(cfg)
    declared = unstack(declared) if plan.unrolled else declared
    params = abstract(declared, cfg.sizes, plan.dtype)
    largest = {kind: (kind, size) for kind, size in sorted(plan.programs)}
    stepping = {"forward", "step", "decode", "refine"}
    assert set(largest) == {*stepping, "sample", "seed_history", "copy_pages"}
    for kind, size in largest.values():
        made = program(plan, module, cfg, params, kind, size)
        exported = jax.export.export(
            jax.jit(made.function, donate_argnums=made.donated),
            platforms=[platform],
            disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(KERNEL["cuda"])],
        )(*made.arguments)
        assert exported.platforms == (platform,)
        if kind in stepping:
            assert (KERNEL[platform] in exported.mlir_module()) == (kernels == "auto")


def test_a_step_over_pages_of_four_bits_lowers_on_hopper() -> None:
    cfg = family("qwen3_moe").config(HF)
    config = EngineConfig(
        max_num_seqs=8, max_num_batched_tokens=32, page_size=64, kv_cache_dtype="int4"
    )
    plan = resolve(config, HF, cfg, lambda *_: 2_000_000, AbsentDevice("cuda"))
    plan = dataclasses.replace(plan, num_pages=16)
    module = family("qwen3_moe")
    params = abstract(unstack(module.declare_params(cfg)), cfg.sizes, plan.dtype)
    made = program(plan, module, cfg, params, "step", 8)
    exported = jax.export.export(
        jax.jit(made.function, donate_argnums=made.donated),
        platforms=["cuda"],
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(KERNEL["cuda"])],
    )(*made.arguments)
    assert "page_write_int4" in exported.mlir_module()
