"""Loads a Hugging Face folder leaf by leaf: each leaf says which tensors it is made of."""

from __future__ import annotations

import itertools
import json
import logging
import math
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from jaxserve.checkpoint.quantized import QuantizedShards
from jaxserve.checkpoint.safetensors import FLOATS, Shards
from jaxserve.checkpoint.schemes import normalised, scheme
from jaxserve.errors import CheckpointError
from jaxserve.models.family import Family
from kernels_pallas.weight import Int8Weight
from sharding.tree import Weight, abstract, cut, is_weight, unstack

log = logging.getLogger(__name__)

_PLACEHOLDER = {"layer": "layer", "experts": "expert"}
"""Axes along which a checkpoint stores tensors of their own -> how a name says their number."""


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a checkpoint.

    Raises:
        CheckpointError: it is not there, or no JSON object.
    """
    path = folder / "config.json"
    if not path.exists():
        raise CheckpointError(
            f"{folder} has no config.json; is it the folder of a Hugging Face model?"
        )
    config = _json_object(path)
    found, inner = _pop_quantization(config), config.get("text_config")
    if isinstance(inner, dict):  # of the part that reads, where a model also sees or hears
        also = _pop_quantization(inner)
        if found and also and found != also:
            raise CheckpointError(
                f"{path} says quantization_config {reprlib.repr(found)}, and in text_config "
                f"{reprlib.repr(also)}; expected one of them, or the same twice"
            )
        found = also or found
    if not found and (beside := folder / "hf_quant_config.json").exists():
        found = _json_object(beside).get("quantization")  # where modelopt keeps it
        found = {"quant_method": "modelopt", **found} if isinstance(found, dict) else found
    found = normalised(found) if isinstance(found, dict) else found
    return config if found is None else {**config, "quantization_config": found}


def _pop_quantization(config: dict[str, Any]) -> Any:
    """What an object of config.json says of how weights are stored, taken out of it."""
    found, older = config.pop("quantization_config", None), config.pop("compression_config", None)
    if isinstance(older, dict):  # what compressed-tensors called it at first
        older = {"quant_method": "compressed-tensors", **older}
    return older if found is None else found


def _json_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(found).__name__}")
    return found


def model_config(family: Family, hf: Mapping[str, Any]) -> Any:
    """The family's own config; null in config.json means what an absent key means.

    Raises:
        CheckpointError: a key that the family needs is missing or out of range.
    """
    try:
        cfg = family.config({key: value for key, value in hf.items() if value is not None})
        scheme(hf)  # what it says of eight-bit weights is understood, or refused
        return cfg
    except KeyError as error:
        raise CheckpointError(f"config.json of {hf.get('model_type')!r} lacks {error}") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"config.json of {hf.get('model_type')!r}: {error}") from None


def load_params(
    folder: Path,
    family: Family,
    cfg: Any,
    dtype: Any,
    *,
    unrolled: bool = False,
    in_int8: Callable[[Weight], bool] = lambda _: False,
    rounded: Callable[..., Int8Weight] | None = None,
    place: Callable[[Weight, Any], Any] = lambda _, x: jax.device_put(x),
    progress: bool = True,
) -> Any:
    """The family's tree of weights, in `dtype`; with `unrolled`, every layer is its own stack.

    Args:
        in_int8: which leaves are held in eight bits, as they are stored or else `rounded`; others
            are given in `dtype`, however they are stored. Stacks are cut where layers differ.
        rounded: `rounded(floats)`, numpy [..., in], is an `Int8Weight` of numpy arrays, and
            `rounded(floats, out)` fills one. It is needed where there are such leaves.
        place: what becomes of a leaf.

    One leaf at a time is on its way: host memory stays within the tree plus one leaf (and on CPU
    within the tree, since its buffers are handed over rather than copied).

    Raises:
        CheckpointError: a tensor is missing, misshapen or not finite.
    """
    raw = read_config(folder)
    stored = scheme(raw)
    shards = Shards(folder) if stored is None else QuantizedShards(folder, stored)
    declared = family.declare_params(cfg)
    declared = unstack(declared) if unrolled else _cut_by_kind(declared, in_int8)
    dtype = np.dtype(dtype)
    shapes = jax.tree.leaves(abstract(declared, cfg.sizes, dtype))
    total = sum(shape.size * shape.dtype.itemsize for shape in shapes)
    columns = (
        TextColumn("loading {task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    with Progress(*columns, transient=True, disable=not progress) as bar:
        task = bar.add_task(folder.name, total=total)

        def load(w: Weight) -> jax.Array:
            bar.advance(task, math.prod(w.shape(cfg.sizes)) * np.dtype(w.dtype or dtype).itemsize)
            if in_int8(w):
                return place(w, _fill_int8(w, shards, cfg, dtype, rounded))
            return place(w, _fill(w, shards, cfg, np.dtype(w.dtype or dtype)))

        params = jax.tree.map(load, declared, is_leaf=is_weight)
    _warn_of_unread(shards, raw)
    return params


def _warn_of_unread(shards: Shards, raw: Mapping[str, Any]) -> None:
    """Weights that nothing asked for: config.json may speak of a smaller model."""
    ahead = raw["num_hidden_layers"] if raw.get("num_nextn_predict_layers") else math.inf
    unread = []
    for name in sorted(set(shards.tensors) - shards.asked):
        layer = re.fullmatch(r"model\.(?:layers\.(\d+)\.)?.*(?:weight|bias)", name)
        if layer and int(layer[1] or 0) < ahead:  # layers that look ahead are not served
            unread.append(name)
    if unread:
        first = shards.tensors[unread[0]]
        log.warning(
            "%s: %d weights are not read, such as %s %s %s: config.json does not ask for them",
            shards.folder, len(unread), unread[0], first.dtype.name, list(first.shape),
        )  # fmt: skip


def _fill(w: Weight, shards: Shards, cfg: Any, dtype: np.dtype) -> np.ndarray:
    """The leaf's array: every tensor of its name read into its slice."""
    out = aligned_empty(w.shape(cfg.sizes), dtype)
    for index, name in tensor_names(w, out.shape):
        if w.read is None:
            shards.read(name, out[index])
        else:
            out[index] = _read(w.read, shards, name, cfg, out[index].shape)
    return out


def _fill_int8(
    w: Weight, shards: Shards, cfg: Any, dtype: np.dtype, rounded: Callable[..., Int8Weight] | None
) -> Int8Weight:
    """The leaf in eight bits: every tensor as it is stored, or rounded if it is not in int8."""
    assert rounded is not None
    if w.read is not None:
        return rounded(_fill(w, shards, cfg, dtype))
    shape = w.shape(cfg.sizes)
    out = Int8Weight(
        aligned_empty(shape, np.dtype(np.int8)),
        aligned_empty(shape[:-1], np.dtype(np.float32)),
    )
    for index, name in tensor_names(w, shape):
        part = Int8Weight(out.values[index], out.scale[index])
        if isinstance(shards, QuantizedShards) and shards.has_rows_of_int8(name):
            shards.read_int8(name, part)
        else:
            floats = np.empty(part.shape, dtype)
            shards.read(name, floats)
            rounded(floats, part)
    return out


def _cut_by_kind(declared: Any, in_int8: Callable[[Weight], bool]) -> Any:
    """The tree with its stacks cut where layers hold other leaves in eight bits."""
    if not hasattr(declared, "stacks"):
        return declared
    sizes = list[int]()
    for stack in declared.stacks:
        leaves, before = jax.tree.leaves(stack, is_leaf=is_weight), None
        for i in leaves[0].layers:
            kinds = [in_int8(replace(w, layers=range(i, i + 1))) for w in leaves]
            if kinds == before:
                sizes[-1] += 1
            else:
                sizes.append(1)
            before = kinds
    return cut(declared, sizes)


def tensor_names(w: Weight, shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], str]]:
    """The tensors that a leaf is made of: where in the leaf each lies, and its name."""
    if "{layer}" not in w.name and w.layers:
        raise CheckpointError(f"{w.name!r} stacks layers but does not name them")
    outer = [axis for axis in w.axes if f"{{{_PLACEHOLDER.get(axis)}}}" in w.name]
    if w.axes[: len(outer)] != tuple(outer):
        raise CheckpointError(f"{w.name!r}: enumerated axes must come first in {w.axes}")
    for index in itertools.product(*(range(n) for n in shape[: len(outer)])):
        numbers = {_PLACEHOLDER[axis]: i for axis, i in zip(outer, index, strict=True)}
        if "layer" in numbers:
            numbers["layer"] = w.layers[numbers["layer"]]
        yield index, w.name.format(**numbers)


def _read(
    read: Callable[..., np.ndarray], shards: Shards, name: str, cfg: Any, shape: tuple[int, ...]
) -> np.ndarray:
    try:
        x = read(shards.get, name, cfg)
    except CheckpointError:
        raise
    except (IndexError, ValueError) as error:  # the hook's own reshape
        raise CheckpointError(f"{name} does not fit config.json: {error}") from None
    if x.dtype.name not in FLOATS:  # `get` gives what is stored, and its scales lie elsewhere
        raise CheckpointError(
            f"{name} is {x.dtype.name} {list(x.shape)}, and no quantization_config in config.json "
            "explains it; take the checkpoint in floats"
        )
    if x.shape != shape:
        raise CheckpointError(
            f"{name} has shape {list(x.shape)}, but config.json asks for {list(shape)}"
        )
    return x


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory that the CPU backend takes over without copying it: it starts at a multiple of 64.

    numpy asks for huge pages where an array is large, and the backend does not.
    """
    nbytes = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)
