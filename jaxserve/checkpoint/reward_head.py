"""Reward heads in files, under the names of Qwen2.5-Math-PRM."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from jaxserve.errors import CheckpointError
from jaxserve.models.reward_head import RewardHead

REWARD_HEAD = "reward_head.safetensors"
"""Where a model's folder has one."""

_NAMES = {
    "w_in": "score.0.weight",
    "b_in": "score.0.bias",
    "w_out": "score.2.weight",
    "b_out": "score.2.bias",
    "prior": "prior",
}


def save_reward_head(file: Path, head: RewardHead) -> None:
    """Writes the head as safetensors."""
    arrays = {name: np.asarray(getattr(head, field)) for field, name in _NAMES.items()}
    save_file(arrays, file, {"format": "pt"})


def load_reward_head(file: Path, embed: int) -> RewardHead:
    """Reads a head for hidden states of `embed` lanes.

    Raises:
        CheckpointError: the file is missing or damaged, or belongs to another model.
    """
    try:
        found = load_file(file)
        head = RewardHead(**{field: jnp.asarray(found[name]) for field, name in _NAMES.items()})
    except Exception as error:  # safetensors raises its own kinds
        raise CheckpointError(f"{file} holds no reward head: {error!r}") from error
    if head.w_in.shape[1] != embed:
        raise CheckpointError(
            f"{file} reads hidden states of {head.w_in.shape[1]} lanes, but the model has {embed}"
        )
    return head
