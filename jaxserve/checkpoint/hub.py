"""Finds a model: a folder, or a name on the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path

from jaxserve.errors import CheckpointError

_PATTERNS = [
    "*.json", "*.safetensors", "*.jinja", "tokenizer.model", "README.md", "LICENSE*", "NOTICE*",
]  # fmt: skip
"""What is read, and what goes along with a model that is made of this one."""


def resolve(model: str | Path, revision: str | None = None) -> Path:
    """The folder of a model, downloaded (or found in the hub's cache) if it is a hub id.

    Raises:
        CheckpointError: it is no folder and cannot be had from the hub.
    """
    if not isinstance(model, str | os.PathLike) or not str(model).strip():
        raise CheckpointError(f"{model=} must be a model's folder, or its id on the hub")
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{model} is a file; give the folder that holds config.json")
    if folder.is_absolute() or str(model).startswith(".") or str(model).count("/") > 1:
        raise CheckpointError(f"{model} is no folder here")
    from huggingface_hub import snapshot_download  # slow to import, and not needed for folders

    try:
        return Path(snapshot_download(str(model), revision=revision, allow_patterns=_PATTERNS))
    except Exception as error:  # the client raises errors of many libraries; all mean the same here
        raise CheckpointError(
            f"{model!r} is no folder here and cannot be had from the hub: {_first_line(error)}. "
            "Check the name, the network and, for a gated model, HF_TOKEN"
        ) from error


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line), type(error).__name__)
