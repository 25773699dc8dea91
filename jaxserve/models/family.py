"""Which module serves which `model_type`.

A family is a module with four functions::

    config(hf) -> Config            # config.json -> a frozen, hashable dataclass
    declare_params(cfg) -> tree     # of sharding.tree.Weight
    forward(cfg, params, tokens, positions, ops, kv) -> (hidden, kv)
    logits(cfg, params, hidden, ops) -> logits

and its Config has `num_layers`, `vocab`, `embed`, `max_len`, `sizes`, `kv_shape` and `key_parts`.
`deepseek_v3_mtp`, which is trained and not served, also has `predict`, of tokens two ahead.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol

from jax import Array

from jaxserve.errors import CheckpointError
from jaxserve.models.ops import Ops

FAMILIES = (
    "deepseek_v2", "deepseek_v3", "gemma3_text", "gpt_oss", "llama",
    "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe",
)  # fmt: skip


class Family(Protocol):
    """The shape of a family's module."""

    def config(self, hf: Mapping[str, Any]) -> Any: ...
    def declare_params(self, cfg: Any) -> Any: ...
    def forward(
        self, cfg: Any, params: Any, tokens: Array, positions: Array, ops: Ops, kv: Any
    ) -> tuple[Array, Any]: ...
    def logits(self, cfg: Any, params: Any, x: Array, ops: Ops) -> Array: ...


def family(model_type: str | None) -> Family:
    """The module for a `model_type`.

    Raises:
        CheckpointError: it is none of `FAMILIES`.
    """
    if model_type not in FAMILIES:
        raise CheckpointError(
            f"model_type {model_type!r} is not supported; known: {', '.join(FAMILIES)}. "
            "CONTRIBUTING.md shows how to add a family"
        )
    return importlib.import_module(f"jaxserve.models.{model_type}")  # type: ignore[return-value]
