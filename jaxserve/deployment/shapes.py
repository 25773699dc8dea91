"""Published models by name: their `config.json`, as the families here read it.

What is planned is therefore what would be compiled: sizes come from `family.config`, and parameters
are counted over `family.declare_params`. DeepSeek's dimensions are those at the head of the
specification; the others are from the checkpoints on the hub.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxserve.errors import ConfigError

_DEEPSEEK = {
    "model_type": "deepseek_v3", "num_hidden_layers": 61, "first_k_dense_replace": 3,
    "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8,
    "topk_group": 4, "routed_scaling_factor": 2.5, "norm_topk_prob": True,
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1,
    "num_nextn_predict_layers": 1, "vocab_size": 129280, "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "attention_bias": False,
    "rope_scaling": {
        "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
        "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
    },
}  # fmt: skip

_QWEN3 = {
    "vocab_size": 151936, "head_dim": 128, "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "attention_bias": False,
}  # fmt: skip

_QWEN3_MOE = {
    **_QWEN3, "model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8,
    "norm_topk_prob": True, "num_key_value_heads": 4, "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}  # fmt: skip

_LLAMA = {
    "model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "deepseek-r1": _DEEPSEEK,
    "deepseek-v3": _DEEPSEEK,
    "qwen3-235b-a22b": {
        **_QWEN3_MOE, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 94,
        "moe_intermediate_size": 1536, "num_attention_heads": 64,
    },
    "qwen3-30b-a3b": {
        **_QWEN3_MOE, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
        "moe_intermediate_size": 768, "num_attention_heads": 32,
    },
    "qwen3-8b": {
        **_QWEN3, "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    "llama-3.1-8b": {
        **_LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llama-3.1-70b": {
        **_LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Shape:
    """A model without its weights.

    Attributes:
        hf: its `config.json`.
        cfg: the same, as its family reads it.
    """

    name: str
    hf: Mapping[str, Any]
    cfg: Any
    family: Any

    @property
    def mtp_layers(self) -> int:
        """Layers that draft the token after next (DeepSeek-V3); most models have none."""
        return self.hf.get("num_nextn_predict_layers") or 0

    @property
    def latent(self) -> bool:
        """Whether attention is MLA: one latent row per token is all that its cache keeps."""
        return hasattr(self.cfg, "kv_lora")

    @property
    def kv_bytes_per_token(self) -> int:
        """Of all layers, in bfloat16: 70,272 for DeepSeek-R1."""
        heads, key, value = self.cfg.kv_shape
        return 2 * heads * (key + value) * self.cfg.num_layers

    @cached_property
    def num_params(self) -> int:
        """Without the layers for multi-token prediction: 671.0 B for DeepSeek-R1."""
        return sum(count for _, count in self._leaves())

    @cached_property
    def active_params(self) -> int:
        """What a token is multiplied with: an embedding row is looked up, and a few experts run."""
        router = self.cfg.router
        share = router.top_k / router.num_experts if router else 1
        return round(sum(
            count * share if "experts" in axes and "expert_mlp" in axes else count
            for axes, count in self._leaves()
        ) - self.cfg.untied * self.cfg.vocab * self.cfg.embed)  # fmt: skip

    def _leaves(self) -> Iterator[tuple[tuple[str, ...], int]]:
        """Axes and number of elements of every weight."""
        import jax

        from sharding.tree import is_weight

        tree = self.family.declare_params(self.cfg)
        for leaf in jax.tree.leaves(tree, is_leaf=is_weight):
            yield leaf.axes, math.prod(leaf.shape(self.cfg.sizes))


def read(model: str) -> Shape:
    """The shape of a published model, or of the checkpoint in a folder.

    Raises:
        ConfigError: it is neither.
        CheckpointError: no family here can read the folder's config.json.
    """
    from jaxserve.checkpoint import hf as checkpoint
    from jaxserve.models.family import family

    if model in SHAPES:
        raw = dict(SHAPES[model])
    elif (Path(model) / "config.json").exists():
        raw = checkpoint.read_config(Path(model))
    else:
        near = difflib.get_close_matches(model, SHAPES, 1, 0.0)[0]
        raise ConfigError(
            f"{model!r} is neither a folder with a config.json nor a published shape; the nearest "
            f"is {near!r}, known are {', '.join(SHAPES)}"
        )
    kind = family(raw.get("model_type"))
    return Shape(model, raw, checkpoint.model_config(kind, raw), kind)
