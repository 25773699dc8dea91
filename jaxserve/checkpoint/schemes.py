"""What `quantization_config` says of weights in eight bits.

Four ways of saying it are known: that of compressed-tensors (vLLM's), int8 or float8 with a scale
for each row, tensor or block; "fp8" of transformers, DeepSeek and vLLM, float8 with a scale for
each block or tensor; "fbgemm_fp8", for each row; and NVIDIA's "modelopt", for each row, tensor or
block. Weights are symmetric in all of them. Scales of activations and of the cache are passed over:
both get their own here.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxserve.errors import CheckpointError


@dataclass(frozen=True)
class Scheme:
    """How large weights are stored.

    Attributes:
        kind: "int8" or "fp8".
        rounds_activations: the checkpoint is meant for products of eight bits on both sides.
        scales: what may follow a weight's name in that of its scales.
        block: rows and columns that share a scale, where scales are for blocks.
        by_row: there are weights with a scale for each row.
        by_tensor: there are weights with one scale.
        fmt: of "fp8", which of the two it is, "e4m3" or "e5m2", if that is said.
    """

    kind: str
    rounds_activations: bool
    scales: tuple[str, ...] = ("_scale",)
    block: tuple[int, int] | None = None
    by_row: bool = True
    by_tensor: bool = True
    fmt: str | None = None

    @property
    def declared(self) -> str:
        """What config.json says eight bits are, as closely as it does."""
        return self.fmt or self.kind


_METHODS = {"compressed_tensors": "compressed-tensors"}
_FLOAT8 = {"float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2"}

_INVERSE = ("_scale_inv", "_scale")
"""transformers writes the first, vLLM's own exporters the second; both are multiplied in."""

_FORMATS = (
    None, "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense",
)  # fmt: skip
"""Of compressed-tensors: a value is a byte, or a float. Others pack several into a word."""


def normalised(config: Mapping[str, Any]) -> dict[str, Any]:
    """A `quantization_config` in the one spelling that is read here, of those that vLLM takes.

    Methods, algorithms and formats may be in either case; modelopt may keep its settings in an
    object `quantization`, and name itself as the `producer` alone.
    """
    found, producer = dict(config), config.get("producer")
    made_by = producer.get("name") if isinstance(producer, Mapping) else None
    method = found.get("quant_method") or (made_by if made_by == "modelopt" else None)
    if isinstance(method, str):
        method = _METHODS.get(method.lower(), method.lower())
    if method == "modelopt" and isinstance(inner := found.get("quantization"), Mapping):
        found = {**found, **inner}
        del found["quantization"]
    if method is not None:
        found["quant_method"] = method
    if isinstance(algorithm := found.get("quant_algo"), str):
        found["quant_algo"] = algorithm.upper()
    if isinstance(fmt := found.get("fmt"), str):
        found["fmt"] = _FLOAT8.get(fmt.lower(), fmt.lower())
    return found


def scheme(hf: Mapping[str, Any]) -> Scheme | None:
    """What config.json says of eight-bit weights; None if it does not speak of them.

    Raises:
        CheckpointError: it speaks of something that is not supported.
    """
    config = hf.get("quantization_config") or {}
    if not isinstance(config, Mapping):
        raise CheckpointError(f"quantization_config {config!r} in config.json: expected an object")
    config = normalised(config)
    match config.get("quant_method"):
        case "compressed-tensors":
            return _compressed_tensors(config)
        case "fp8":
            return _fp8(config)
        case "fbgemm_fp8":
            return Scheme("fp8", True, by_tensor=False)
        case "modelopt":
            return _modelopt(config)
    return None


def _fp8(config: Mapping[str, Any]) -> Scheme:
    _expect("activation_scheme", config.get("activation_scheme", "dynamic"), "dynamic", "static")
    _expect("fmt", fmt := config.get("fmt"), None, "e4m3", "e5m2")
    if (block := config.get("weight_block_size")) is None:
        return Scheme("fp8", True, _INVERSE, fmt=fmt)
    tile = _block("weight_block_size", block)
    return Scheme("fp8", True, _INVERSE, tile, by_row=False, by_tensor=False, fmt=fmt)


def _modelopt(config: Mapping[str, Any]) -> Scheme | None:
    _object(config, "quantization")
    if (algorithm := config.get("quant_algo")) is None:
        return None  # the cache alone is quantised
    _expect("quant_algo", algorithm, "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO")
    if algorithm == "FP8_PB_WO":
        return Scheme("fp8", False, block=(128, 128), by_row=False, by_tensor=False)
    return Scheme("fp8", True, by_tensor=algorithm == "FP8")


def _compressed_tensors(config: Mapping[str, Any]) -> Scheme | None:
    _expect("format", config.get("format"), *_FORMATS)
    sparsity = _object(config, "sparsity_config")
    _expect("sparsity_config.format", sparsity.get("format", "dense"), "dense")
    if _object(config, "transform_config").get("config_groups"):
        raise CheckpointError(
            "quantization_config.transform_config: activations that are rotated while the model "
            "runs are not supported; take a checkpoint without"
        )
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not (groups or config.get("kv_cache_scheme")):
        raise CheckpointError(
            f"quantization_config.config_groups {groups!r}: expected groups, each with weights"
        )
    each = (_group(f"config_groups.{name}", group) for name, group in groups.items())
    if not (found := [scheme for scheme in each if scheme is not None]):
        return None  # the cache alone is quantised
    kinds, blocks = {s.kind for s in found}, {s.block for s in found if s.block}
    if len(kinds) > 1 or len(blocks) > 1:
        raise CheckpointError(
            "quantization_config.config_groups differ in the "
            f"{'type' if len(kinds) > 1 else 'block_structure'} of weights; expected one for all"
        )
    return Scheme(
        kinds.pop(), all(s.rounds_activations for s in found),
        block=blocks.pop() if blocks else None, by_row=any(s.by_row for s in found),
        by_tensor=any(s.by_tensor for s in found),
    )  # fmt: skip


def _group(name: str, group: Any) -> Scheme | None:
    """What a group says of its modules' weights; None if only of what goes in or comes out."""
    if isinstance(group, Mapping) and group and group.get("weights") is None:
        return None
    weights = group.get("weights") if isinstance(group, Mapping) else None
    activations = group.get("input_activations") if isinstance(group, Mapping) else None
    for key, side in (("weights", weights), ("input_activations", activations or {"num_bits": 8})):
        if not isinstance(side, Mapping):
            seen = reprlib.repr(side if isinstance(group, Mapping) else group)
            raise CheckpointError(f"quantization_config.{name}.{key} {seen}: expected an object")
        _expect(f"{name}.{key}.num_bits", side.get("num_bits"), 8)
    assert weights is not None
    _expect(f"{name}.format", group.get("format"), *_FORMATS)
    _expect(f"{name}.weights.symmetric", weights.get("symmetric", True), True)
    _expect(f"{name}.weights.type", weights.get("type", "int"), "int", "float")
    strategy = weights.get("strategy") or "tensor"
    _expect(f"{name}.weights.strategy", strategy, "channel", "tensor", "block")
    key, in_blocks = f"{name}.weights.block_structure", strategy == "block"
    return Scheme(
        "int8" if weights.get("type", "int") == "int" else "fp8", activations is not None,
        block=_block(key, weights.get("block_structure")) if in_blocks else None,
        by_row=strategy == "channel", by_tensor=strategy == "tensor",
    )  # fmt: skip


def _block(key: str, seen: Any) -> tuple[int, int]:
    if isinstance(seen, list) and len(seen) == 2 and all(type(n) is int and n > 0 for n in seen):
        return seen[0], seen[1]
    raise CheckpointError(
        f"quantization_config.{key} {seen!r}: expected [n, k], whole numbers from 1"
    )


def _object(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object that may be missing, or null."""
    found = config.get(key) or {}
    if not isinstance(found, Mapping):
        raise CheckpointError(f"quantization_config.{key} {found!r}: expected an object")
    return found


def _expect(key: str, seen: Any, *known: Any) -> None:
    if seen not in known:
        names = ", ".join(repr(value) for value in known if value is not None)
        raise CheckpointError(
            f"quantization_config.{key} {seen!r} is not supported; known: {names}. Take the "
            "checkpoint in floats, and quantization='int8'"
        )
