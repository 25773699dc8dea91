"""Writes a Hugging Face folder: the way of `checkpoint.hf`, backwards."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from jaxserve.checkpoint import cache_scales
from jaxserve.checkpoint.hf import tensor_names
from jaxserve.checkpoint.reward_head import REWARD_HEAD, ROTATED, save_reward_head
from jaxserve.errors import CheckpointError
from jaxserve.models.family import Family
from jaxserve.models.reward_head import RewardHead
from kernels_pallas.weight import Int8Weight
from sharding.tree import Weight, cut, is_weight

_SHARD_BYTES = 5 << 30
_TEXT_FILES = (
    "tokenizer*", "*.model", "vocab*", "merges.txt", "tekken.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template*", "generation_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip


def save_pretrained(
    folder: Path,
    family: Family,
    cfg: Any,
    params: Any,
    config: Mapping[str, Any],
    *,
    beside: Path | None = None,
    card: str | None = None,
    kv_scales: Mapping[str, np.ndarray] | None = None,
    reward_head: RewardHead | None = None,
) -> None:
    """Writes config.json and safetensors that `transformers` and `LLM` load.

    The folder appears, or is replaced, only when everything has been written; what an interrupt or
    an error leaves unfinished is removed.

    Args:
        config: what config.json says, but for `auto_map`: no code goes along.
        beside: a folder whose tokenizer, chat template, generation defaults and licence go along.
        card: what README.md says; without it there is none.
        kv_scales: of a cache in eight bits, as `cache_scales.save` takes them.
        reward_head: that judges paths by the model's hidden states.

    Raises:
        CheckpointError: a weight has no form in a checkpoint, `folder` is a mount point, or writing
            failed; `folder` is as it was.
    """
    fresh = begin(folder)
    folder = folder.resolve()  # a link to a folder stays one
    try:
        if beside is not None:
            _copy_text_files(beside, fresh)
        tensors = named_tensors(family, cfg, params)
        written = {**config, "dtype": next(iter(tensors.values())).dtype.name}
        written.pop("auto_map", None)  # names files of Python that stay behind
        if not any(x.dtype == np.int8 for x in tensors.values()):
            written.pop("quantization_config", None)  # it described the source checkpoint
        text = json.dumps(written, indent=2)
        (fresh / "config.json").write_text(text + "\n")
        if card is not None:
            (fresh / "README.md").write_text(card, encoding="utf-8")
        if kv_scales is not None:
            cache_scales.save(fresh, kv_scales)
        if reward_head is not None:
            rotated = bool(config.get(ROTATED))
            save_reward_head(fresh / REWARD_HEAD, reward_head, rotated=rotated)
        _write_shards(fresh, tensors)
        for file in fresh.glob("*.safetensors"):  # safetensors writes files with mode 0600
            shutil.copymode(fresh / "config.json", file)
        _put_in_place(fresh, folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder} was not written: {error}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)  # gone by now, unless something went wrong


def begin(folder: Path) -> Path:
    """An empty folder beside the one to write, which is as it was.

    Beside what a link leads to: only there it can be renamed into its place.

    Raises:
        CheckpointError: nothing can be written there, or it is a mount point.
    """
    try:
        folder = folder.resolve()
        if os.path.ismount(folder):
            raise CheckpointError(f"{folder} is a mount point; give a folder in it")
        fresh = folder.with_name(f".{folder.name}.writing")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
    except (OSError, RuntimeError) as error:  # the latter: links that lead in a circle
        raise CheckpointError(f"{folder} cannot be written: {error}") from error
    return fresh


def _put_in_place(fresh: Path, folder: Path) -> None:
    """Renames a finished folder; one that is in its place goes only when it has come."""
    old = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    try:
        fresh.rename(folder)
    except BaseException:  # an interrupt, too
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def named_tensors(family: Family, cfg: Any, params: Any) -> dict[str, np.ndarray]:
    """Every weight under its name in a checkpoint; layers may be stacked in any of both ways.

    An eight-bit weight has its scales beside it, in the way of compressed-tensors.

    Raises:
        CheckpointError: a family's layout can only be read.
    """
    tree = family.declare_params(cfg)
    if hasattr(tree, "stacks"):
        tree = cut(tree, [len(jax.tree.leaves(stack)[0]) for stack in params.stacks])
    declared = jax.tree.leaves(tree, is_leaf=is_weight)
    arrays = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Int8Weight))
    tensors: dict[str, np.ndarray] = {}
    for spec, array in zip(declared, arrays, strict=True):
        if isinstance(array, Int8Weight):
            _put_eight_bits(tensors, spec, array)
            continue
        whole = np.asarray(array)
        for index, name in tensor_names(spec, whole.shape):
            part = whole[index]
            if spec.write is not None:
                spec.write(tensors, name, cfg, part)
            elif spec.read is not None:
                raise CheckpointError(f"{name} is stored in a layout that can only be read")
            else:
                tensors[name] = part.reshape(_stored_shape(spec, part))
        tensors |= dict.fromkeys(spec.also, whole)
    return {name: np.ascontiguousarray(x) for name, x in tensors.items()}


def _put_eight_bits(tensors: dict[str, np.ndarray], spec: Weight, w: Int8Weight) -> None:
    values, scale = np.asarray(w.values), np.asarray(w.scale)
    for index, name in tensor_names(spec, values.shape):
        if spec.write is not None or spec.read is not None:
            raise CheckpointError(f"{name} is stored in a layout that has no eight-bit form")
        part = values[index]
        tensors[name] = part.reshape(_stored_shape(spec, part))
        tensors[f"{name}_scale"] = scale[index].reshape(-1, 1)


def _stored_shape(spec: Weight, part: np.ndarray) -> tuple[int, ...]:
    """Checkpoints know vectors and matrices: heads and their lanes are one axis there."""
    if not spec.is_matrix:
        return (part.size,)
    return (part.size // part.shape[-1], part.shape[-1])


def _copy_text_files(source: Path, target: Path) -> None:
    """What makes tokens of text, and licences. A card stays behind: it speaks of another model."""
    for file in {file for pattern in _TEXT_FILES for file in source.glob(pattern)}:
        if file.is_file():
            shutil.copy2(file, target / file.name)


def _write_shards(folder: Path, tensors: Mapping[str, np.ndarray]) -> None:
    shards: list[dict[str, np.ndarray]] = [{}]
    for name, x in tensors.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + x.nbytes > _SHARD_BYTES:
            shards.append({})
        shards[-1][name] = x
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", {"format": "pt"})
        return
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, folder / file, {"format": "pt"})
    index = {
        "metadata": {"total_size": sum(x.nbytes for x in tensors.values())},
        "weight_map": {name: f for f, s in zip(files, shards, strict=True) for name in s},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
