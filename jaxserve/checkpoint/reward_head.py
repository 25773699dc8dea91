"""Reward heads in files, under the names of Qwen2.5-Math-PRM."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jaxserve.errors import CheckpointError
from jaxserve.models.reward_head import RewardHead

REWARD_HEAD = "reward_head.safetensors"
"""Where a model's folder has one."""

ROTATED = "hidden_states_rotated"
"""In config.json and in a head's metadata: that hidden states are those of a rotated model."""

_NAMES = {
    "w_in": "score.0.weight",
    "b_in": "score.0.bias",
    "w_out": "score.2.weight",
    "b_out": "score.2.bias",
    "prior": "prior",
}


def save_reward_head(file: Path, head: RewardHead, *, rotated: bool = False) -> None:
    """Writes the head as safetensors.

    Args:
        rotated: whether it was made for a checkpoint whose config.json says `ROTATED`.
    """
    arrays = {name: np.asarray(getattr(head, field)) for field, name in _NAMES.items()}
    save_file(arrays, file, {"format": "pt", **({ROTATED: "true"} if rotated else {})})


def load_reward_head(file: Path, embed: int, *, rotated: bool = False) -> RewardHead:
    """Reads a head for hidden states of `embed` lanes.

    Args:
        rotated: whether the model's config.json says `ROTATED`.

    Raises:
        CheckpointError: the file is missing or damaged, or belongs to another model.
    """
    try:
        with safe_open(file, "numpy") as opened:
            known = ROTATED in (opened.metadata() or {})
        found = load_file(file)
        head = RewardHead(**{field: jnp.asarray(found[name]) for field, name in _NAMES.items()})
    except Exception as error:  # safetensors raises its own kinds
        raise CheckpointError(f"{file} holds no reward head: {error!r}") from error
    if head.w_in.shape[1] != embed:
        raise CheckpointError(
            f"{file} reads hidden states of {head.w_in.shape[1]} lanes, but the model has {embed}"
        )
    if known != rotated:
        kinds = {True: "rotated ones", False: "those of the model in floats"}
        raise CheckpointError(
            f"{file} reads hidden states that are {kinds[known]}, but this checkpoint's are "
            f"{kinds[rotated]}: take the head that `jaxserve quantize` writes beside the model, or "
            "quantize with --no-rotations"
        )
    return head
