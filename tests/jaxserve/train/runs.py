"""Small runs: a model of a few thousand weights that learns a task of ours."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from jaxserve.cli.prepare import prepare
from jaxserve.train.config import (
    AdapterConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    SaveConfig,
    TrainConfig,
)
from jaxserve.train.loop import Run

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
QWEN3_MOE = {
    **SIZES,
    "model_type": "qwen3_moe",
    "head_dim": 16,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}
QWEN3 = {**SIZES, "model_type": "qwen3", "head_dim": 16}
DEEPSEEK_V3 = {
    **SIZES,
    "model_type": "deepseek_v3",
    "num_key_value_heads": 2,
    "moe_intermediate_size": 32,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
}


def config(folder: Path, hf: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
    """Twelve steps over ModChain with four saves; `changes` are fields of `TrainConfig`."""
    made = TrainConfig(
        model=ModelConfig(config=hf or QWEN3_MOE),
        data=DataConfig(task="modchain", settings={"modulus": 7, "length": 3}),
        save=SaveConfig(str(folder), every=3),
        steps=12,
        rows=4,
        length=48,
        optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=2),
    )
    return dataclasses.replace(made, **changes)


def adapted(folder: Path, base: Path, adapter: AdapterConfig, **changes: Any) -> TrainConfig:
    """The same over a checkpoint."""
    return config(folder, model=ModelConfig(path=str(base)), adapter=adapter, **changes)


def job(folder: Path, hf: dict[str, Any] | None = None, **changes: Any) -> Run:
    return prepare(config(folder, hf, **changes))


def metrics(folder: Path) -> list[dict[str, float]]:
    """What a run noted of every step, but for the time it took."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(line.pop("seconds") > 0 for line in lines)
    return lines
