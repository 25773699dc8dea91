"""A real model's step compiled for absent TPUs and GPUs: what runs, and what is copied."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxserve.config import EngineConfig
from jaxserve.engine.signature import program
from jaxserve.models.family import family
from jaxserve.plan import resolve
from jaxserve.quant.weights import is_large
from kernels_pallas.weight import Int8Weight
from sharding import compile_only
from sharding.tree import abstract, is_weight, unstack
from tests.sparing import sparing

COMMON = {
    "num_hidden_layers": 2, "vocab_size": 32768, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "torch_dtype": "bfloat16", "hidden_act": "silu",
}  # fmt: skip
MODELS = {
    "8b": {
        **COMMON, "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    },
    "30b-a3b": {
        **COMMON, "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
        "mlp_only_layers": [],
    },
    "16b-mla": {
        **COMMON, "model_type": "deepseek_v3", "hidden_size": 2048, "intermediate_size": 11264,
        "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None,
        "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "first_k_dense_replace": 1, "n_routed_experts": 64, "num_experts_per_tok": 6,
        "moe_intermediate_size": 1408, "n_shared_experts": 2, "n_group": 1, "topk_group": 1,
        "norm_topk_prob": True, "routed_scaling_factor": 2.4, "scoring_func": "sigmoid",
        "topk_method": "noaux_tc", "attention_bias": False,
    },
}  # fmt: skip
COPIES = ("copy", "dynamic-slice", "transpose", "convert")


class Absent:
    """A compile-only device, which has no memory to ask about."""

    def __init__(self, device):
        self.platform, self.device_kind = device.platform, device.device_kind

    def memory_stats(self):
        return {"bytes_limit": 64 << 30}


def compiled(
    target: str, model: str, quantization: str | None, cache: Any,
    kind: str = "step", size: int = 64,
):  # fmt: skip
    """A program, by default of a decoding step of 64 sequences, and the plan that it is of."""
    mesh = compile_only.mesh(target)
    module, hf = family(MODELS[model]["model_type"]), MODELS[model]
    cfg = module.config(hf)
    config = EngineConfig(
        max_num_seqs=64, num_pages=2048, max_model_len=8192, quantization=quantization,
        kv_cache_dtype=cache,
    )  # fmt: skip
    plan = resolve(config, hf, cfg, lambda *_: 0, Absent(mesh.devices.flat[0]))
    declared = module.declare_params(cfg)
    declared = unstack(declared) if plan.unrolled else declared

    def rounded(w, a):
        if not quantization or not is_large(w):
            return a
        scale = jax.ShapeDtypeStruct(a.shape[:-1], jnp.float32)
        return Int8Weight(jax.ShapeDtypeStruct(a.shape, jnp.int8), scale)

    params = abstract(declared, cfg.sizes, plan.dtype)
    params = jax.tree.map(rounded, declared, params, is_leaf=is_weight)
    made = program(plan, module, cfg, params, kind, size)
    here = NamedSharding(mesh, PartitionSpec())
    arguments = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), made.arguments
    )
    return jax.jit(made.function, donate_argnums=made.donated).lower(*arguments).compile(), plan


def large(hlo: str, at_least: int) -> Counter[str]:
    """What makes arrays of so many elements, outside fusions: operations and how many there are."""
    found, fused = Counter[str](), False
    for line in hlo.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            fused = bool(re.search("fused|bitcast_fusion|_computation", line))
        made = re.match(r"\s+(?:ROOT )?%?\S+ = \w+\[([\d,]+)\]\S* ([\w-]+)\(", line)
        if made and not fused and math.prod(map(int, made[1].split(","))) >= at_least:
            found[made[2]] += 1
    return found


def kernels(hlo: str) -> set[str]:
    """Names of the Pallas kernels of a TPU program."""
    calls = (line for line in hlo.splitlines() if "tpu_custom_call" in line)
    return {re.sub(r"\s*(?:ROOT )?%?([a-z_0-9]+).*", r"\1", line) for line in calls}


CODED = {"page_write_int4", "page_attention", "sample"}
PAGES = {"page_write", "page_attention", "sample"}
ON_TPUS = [
    ("v6e:2x2", "8b", None, "auto", PAGES),
    ("v6e:2x2", "30b-a3b", "int8", "auto", PAGES | {"int8_matmul", "grouped_matmul"}),
    ("v5e:2x2", "16b-mla", None, "auto", PAGES | {"grouped_matmul"}),
    ("v6e:2x2", "8b", None, "int4", CODED),
    ("v5e:2x2", "16b-mla", None, "int4", CODED | {"grouped_matmul"}),
]
ON_HOPPER = [  # and how many kernels at least: their names are not in the program
    ("8b", "int8", "auto", 2 * 7 + 2),
    ("30b-a3b", None, "auto", 2 * 4),
    ("16b-mla", None, "auto", 2 * 2 + 3 + 1),
    ("8b", None, "int8", 2 * 2 + 1),
    ("8b", None, "int4", 2 * 2 + 1),
    ("16b-mla", None, "int8", 2 * 2 + 3 + 1),
    ("16b-mla", None, "int4", 2 * 2 + 3 + 1),
]


@pytest.mark.aot
@pytest.mark.usefixtures("no_compilation_cache")
@pytest.mark.parametrize(
    ("target", "model", "quantization", "cache", "expected"), sparing(ON_TPUS, ON_TPUS[-1])
)
def test_a_step_copies_neither_weights_nor_cache(target, model, quantization, cache, expected):
    made, plan = compiled(target, model, quantization, cache)
    assert not copied(made, plan)
    assert kernels(made.as_text()) == expected


@pytest.mark.aot
@pytest.mark.usefixtures("no_compilation_cache")
@pytest.mark.parametrize(
    ("model", "quantization", "cache", "at_least"), sparing(ON_HOPPER, ON_HOPPER[2], ON_HOPPER[4])
)
def test_nor_does_one_on_hopper(model, quantization, cache, at_least):
    made, plan = compiled("h200:1x1x1", model, quantization, cache)
    assert not copied(made, plan)
    assert made.as_text().count('custom_call_target="mosaic_gpu_v2"') >= at_least


@pytest.mark.aot
@pytest.mark.usefixtures("no_compilation_cache")
def test_one_row_of_many_is_sampled_on_hopper():
    """XLA would take the slice of hidden states into its product, and fail to compile it."""
    made, _ = compiled("h200:1x1x1", "8b", None, "auto", "sample", 1)
    assert made.as_text().count('custom_call_target="mosaic_gpu_v2"') == 1


def copied(made: Any, plan: Any) -> list[str]:
    """What a program makes a second time: the cache, a table of the vocabulary, or weights."""
    memory, made_large = made.memory_analysis(), large(made.as_text(), 4_000_000)
    wrong = [f"{made_large[kind]} {kind}" for kind in COPIES if made_large[kind]]
    if memory.alias_size_in_bytes < plan.kv_bytes:
        wrong.append(f"{plan.kv_bytes} bytes of cache: {memory.alias_size_in_bytes} are in place")
    if memory.temp_size_in_bytes >= 128 << 20:  # a table of the vocabulary has 134 MB, or 268
        wrong.append(f"{memory.temp_size_in_bytes} bytes of temporaries")
    return wrong
