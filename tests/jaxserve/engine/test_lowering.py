"""A step's programs lower for hardware that is not here: nothing in them asks for a platform."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.cache import kv_cache
from jaxserve.config import EngineConfig
from jaxserve.engine.batch import SlotTable, StepArrays, pack_sampling
from jaxserve.engine.programs import forward_step, sample_step
from jaxserve.engine.sampler import MAX_BIAS
from jaxserve.engine.scheduler import Step
from jaxserve.models.family import family
from jaxserve.plan import Plan, resolve
from sharding.tree import abstract

HF = {
    "model_type": "qwen3_moe", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True,
    "torch_dtype": "bfloat16", "mlp_only_layers": [0],
}  # fmt: skip


class AbsentDevice:
    """As much of an accelerator as a plan asks of it."""

    def __init__(self, platform: str):
        self.platform = platform

    def memory_stats(self) -> dict[str, int]:
        return {"bytes_limit": 16 << 30, "bytes_in_use": 0}


def planned(platform: str) -> tuple[Plan, object]:
    cfg = family("qwen3_moe").config(HF)
    config = EngineConfig(max_num_seqs=8, max_num_batched_tokens=32)
    return resolve(config, HF, cfg, lambda *_: 2_000_000, AbsentDevice(platform)), cfg


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_programs_lower_for_absent_hardware(platform: str) -> None:
    plan, cfg = planned("gpu" if platform == "cuda" else platform)
    assert plan.dtype == jnp.bfloat16 and plan.kernels == "reference" and not plan.unrolled
    module = family("qwen3_moe")
    params = abstract(module.declare_params(cfg), cfg.sizes, plan.dtype)
    plan = dataclasses.replace(plan, num_pages=16)
    kv = jax.eval_shape(
        partial(kv_cache.allocate, 3, 16, plan.page_size, cfg.kv_shape, plan.kv_dtype, None)
    )
    ints = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    history = ints((8, plan.max_model_len + 1))
    arrays = StepArrays(ints((4, 32)), ints((3, 9)), ints((8, plan.pages_per_seq)), ints((2,)))
    step = jax.jit(partial(forward_step, plan, module, cfg), donate_argnums=1)
    exported = jax.export.export(step, platforms=[platform])(params, kv, history, arrays)
    assert exported.platforms == (platform,)
    assert exported.out_avals[0].shape == (8, cfg.embed)

    unused = {
        "bias_ids": np.zeros((8, MAX_BIAS), np.int32),
        "bias": np.zeros((8, MAX_BIAS), np.float32),
        "mask": np.zeros((8, -(-cfg.vocab // 32)), np.uint32),
    }
    drawing = pack_sampling(Step(), 8, SlotTable(plan, cfg.vocab), unused)
    last = jax.ShapeDtypeStruct((8, cfg.embed), plan.activation_dtype)
    step = jax.jit(partial(sample_step, plan, module, cfg), donate_argnums=2)
    exported = jax.export.export(step, platforms=[platform])(
        params,
        last,
        history,
        jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), drawing),
    )
    assert exported.out_avals[0].shape == (8,)
