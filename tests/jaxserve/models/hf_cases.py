"""Tiny random checkpoints of every family and feature, made by transformers, and its logits.

A case is a `config.json` as it is found on the hub, in either spelling. Weights are written by
transformers' own classes, so their names and layouts are its, not ours::

    folder = checkpoint("deepseek_v3")            # made once per session
    expected = logits("deepseek_v3", tokens)      # [B, T, V] float32, through from_pretrained
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.testing import MXFP4, write_checkpoint, write_tokenizer

VOCAB = 320

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}

_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
_MSCALE_YARN = {
    "type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.8,
    "mscale_all_dim": 0.6,
}

_DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 48,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.7,
}
_V2 = {**_DEEPSEEK, "scoring_func": "softmax", "topk_method": "group_limited_greedy"}
_V3 = {**_DEEPSEEK, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True}

_QWEN3_MOE: dict[str, Any] = {
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 48,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
}
_GEMMA3: dict[str, Any] = {
    "head_dim": 24,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 40,
    "sliding_window": 7,
    "tie_word_embeddings": True,
}
_GPT_OSS: dict[str, Any] = {
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 7,
    "attention_bias": True,
    "rope_theta": 150000.0,
    "rope_scaling": {**_YARN, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
}

CASES: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "rope_scaling": _LLAMA3,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llama-linear-tied": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0},
        "tie_word_embeddings": True,
        "num_key_value_heads": 4,
    },
    "llama-llama3-new": {
        "model_type": "llama",
        "rope_parameters": {**_LLAMA3, "rope_theta": 5000.0},
        "num_key_value_heads": 1,
    },
    "mistral": {"model_type": "mistral", "sliding_window": 7},
    "mistral-unlimited": {
        "model_type": "mistral",
        "sliding_window": None,
        "head_dim": 24,
        "rope_scaling": {"type": "linear", "factor": 4.0},
    },
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True, "use_sliding_window": False},
    "qwen2-window": {
        "model_type": "qwen2",
        "num_hidden_layers": 4,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 2,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "rope_scaling": _YARN},
    "qwen3-layer-types": {
        "model_type": "qwen3",
        "head_dim": 32,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {**_YARN, "rope_theta": 20000.0, "attention_factor": 1.3},
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        **_QWEN3_MOE,
        "mlp_only_layers": [0],
        "norm_topk_prob": True,
    },
    "qwen3_moe-step-window": {
        "model_type": "qwen3_moe",
        **_QWEN3_MOE,
        "decoder_sparse_step": 2,
        "norm_topk_prob": False,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 2,
    },
    "mixtral": {
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 9,
    },
    "deepseek_v2": {
        "model_type": "deepseek_v2",
        **_V2,
        "n_shared_experts": 2,
        "rope_scaling": _MSCALE_YARN,
    },
    "deepseek_v2-greedy": {
        "model_type": "deepseek_v2",
        **_V2,
        "topk_method": "greedy",
        "n_group": None,
        "topk_group": None,
        "q_lora_rank": None,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "deepseek_v3": {"model_type": "deepseek_v3", **_V3, "rope_scaling": _MSCALE_YARN},
    "deepseek_v3-plain": {
        "model_type": "deepseek_v3",
        **_V3,
        "q_lora_rank": None,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 0,
        "first_k_dense_replace": 0,
        "norm_topk_prob": False,
        "rope_interleave": False,
        "rope_parameters": {**_YARN, "rope_theta": 10000.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "deepseek_v3-bias": {
        "model_type": "deepseek_v3",
        **_V3,
        "attention_bias": True,
        "first_k_dense_replace": 2,
        "num_nextn_predict_layers": 1,
    },
    "gemma3_text": {
        "model_type": "gemma3_text",
        **_GEMMA3,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 5000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window_pattern": 3,
    },
    "gemma3_text-new": {
        "model_type": "gemma3_text",
        **_GEMMA3,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 8000.0},
            "full_attention": {**_YARN, "rope_theta": 500000.0},
        },
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "final_logit_softcapping": 5.0,
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
    "gpt_oss": {"model_type": "gpt_oss", **_GPT_OSS},
    "gpt_oss-default-rope": {
        "model_type": "gpt_oss",
        **_GPT_OSS,
        "attention_bias": False,
        "rope_scaling": None,
        "layer_types": ["full_attention", "full_attention", "sliding_attention"],
    },
    "gpt_oss-mxfp4": {
        "model_type": "gpt_oss",
        **_GPT_OSS,
        "intermediate_size": 64,
        "quantization_config": MXFP4,
    },
}
"""Name of a case -> what its config.json says beyond the base. Plain family names come first."""

FAMILIES = tuple(name for name in CASES if "-" not in name)


def config(name: str) -> dict[str, Any]:
    """The case's config.json."""
    c = {**_BASE, **CASES[name]}
    if "rope_parameters" in c:
        c = {k: v for k, v in c.items() if k not in ("rope_theta", "rope_scaling")}
    return c


def checkpoint(name: str) -> Path:
    """The case's folder, with a tokenizer; made at its first use in a process."""
    folder = _home() / name
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        if "quantization_config" in CASES[name]:  # transformers cannot write these on CPU
            write_checkpoint(partial, tokenizer=False, **config(name))
        else:
            _write(partial, config(name))
        write_tokenizer(partial, VOCAB, adds_bos=False)
        partial.rename(folder)
    return folder


@functools.cache
def _home() -> Path:
    import atexit

    home = Path(tempfile.mkdtemp(prefix="jaxserve-cases-"))
    owner = os.getpid()
    atexit.register(lambda: os.getpid() == owner and shutil.rmtree(home, ignore_errors=True))
    return home


def _write(folder: Path, c: dict[str, Any]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        settings = {k: v for k, v in json.loads(json.dumps(c)).items() if k != "model_type"}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(c["model_type"], **settings))
        with torch.no_grad():
            for weight in [*model.float().parameters(), *_stored_buffers(model)]:
                _randomise(weight, transposed=c["model_type"] == "gpt_oss")
        model.save_pretrained(folder)
    architectures = [type(model).__name__]
    config_json = {"architectures": architectures, "torch_dtype": "float32", **c}
    (folder / "config.transformers.json").write_text((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config_json, indent=2))


def _stored_buffers(model: Any) -> list[Any]:
    return [b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]


def _randomise(weight: Any, transposed: bool) -> None:
    """Vectors wobble around what they were; matrices make activations and logits of a few units."""
    if weight.numel() == 0:
        return
    if weight.ndim == 1:
        weight.add_(0.2 * weight.new_empty(weight.shape).normal_())
        return
    fan_in = weight.shape[-2] if transposed and weight.ndim == 3 else weight.shape[-1]
    weight.normal_().mul_(1.5 / fan_in**0.5)


@functools.lru_cache(maxsize=2)
def reference(name: str) -> Any:
    """The case as transformers loads it, in float32, in evaluation mode."""
    import torch
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, report = AutoModelForCausalLM.from_pretrained(
            checkpoint(name),
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
        )
    unread = {key: found for key, found in report.items() if found}
    assert not unread, f"transformers does not load {name} whole: {unread}"
    return model.eval()


def logits(name: str, tokens: np.ndarray) -> np.ndarray:
    """transformers' logits [B, T, V] for tokens [B, T]."""
    import torch

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return reference(name)(torch.from_numpy(np.asarray(tokens, np.int64))).logits.numpy()
