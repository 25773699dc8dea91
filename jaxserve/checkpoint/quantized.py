"""Checkpoints whose large weights are stored in eight bits, each with scales beside it.

Two ways of saying so in `quantization_config` are known: that of compressed-tensors (vLLM's), int8
or float8 with a scale for each row or tensor under `..._scale`, and DeepSeek's "fp8", float8 with a
scale for each block under `..._scale_inv`. All of them are symmetric.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxserve.checkpoint.safetensors import Shards
from jaxserve.errors import CheckpointError

_TYPES = {"int8": ("int8",), "fp8": ("float8_e4m3fn", "float8_e5m2")}


@dataclass(frozen=True)
class Scheme:
    """How large weights are stored.

    Attributes:
        kind: "int8" or "fp8".
        rounds_activations: the checkpoint is meant for products of eight bits on both sides.
        scale: what follows a weight's name in that of its scales.
        block: rows and columns that share a scale; None: rows, or the whole tensor.
    """

    kind: str
    rounds_activations: bool
    scale: str = "_scale"
    block: tuple[int, int] | None = None


class EightBits(NamedTuple):
    """A stored weight, values * scale: int8 [..., *out, *in], float32 [..., *out]."""

    values: np.ndarray
    scale: np.ndarray


def scheme(hf: Mapping[str, Any]) -> Scheme | None:
    """What config.json says of eight-bit weights; None if it does not speak of them.

    Raises:
        CheckpointError: it speaks of something that is not supported.
    """
    config = hf.get("quantization_config") or {}
    method = config.get("quant_method")
    if method == "fp8":
        block = config.get("weight_block_size")
        _expect(
            "activation_scheme", config.get("activation_scheme", "dynamic"), "dynamic", "static"
        )
        if block is None:
            return Scheme("fp8", True)
        if not (isinstance(block, list) and len(block) == 2 and min(block) > 0):
            raise CheckpointError(
                f"quantization_config.weight_block_size {block!r}: expected [n, k]"
            )
        return Scheme("fp8", True, "_scale_inv", (block[0], block[1]))
    return _compressed_tensors(config) if method == "compressed-tensors" else None


def _compressed_tensors(config: Mapping[str, Any]) -> Scheme:
    groups = config.get("config_groups")
    group = next(iter(groups.values())) if isinstance(groups, dict) and len(groups) == 1 else None
    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        raise CheckpointError(
            f"quantization_config.config_groups {groups!r}: expected one group, with weights"
        )
    weights, activations = group["weights"], group.get("input_activations")
    for side in (weights, activations or {"num_bits": 8, "symmetric": True}):
        _expect("num_bits", side.get("num_bits"), 8)
        _expect("symmetric", side.get("symmetric", True), True)
    _expect("weights.strategy", weights.get("strategy", "tensor"), "channel", "tensor")
    _expect("weights.type", weights.get("type", "int"), "int", "float")
    kind = "int8" if weights.get("type", "int") == "int" else "fp8"
    return Scheme(kind, activations is not None)


def _expect(key: str, seen: Any, *known: Any) -> None:
    if seen not in known:
        names = ", ".join(map(repr, known))
        raise CheckpointError(
            f"quantization_config: {key} {seen!r} is not supported; known: {names}"
        )


class QuantizedShards(Shards):
    """Tensors of which some are stored in eight bits; they are read as floats, or as they are."""

    def __init__(self, folder: Path, scheme: Scheme):
        super().__init__(folder)
        self.scheme = scheme

    def is_quantized(self, name: str) -> bool:
        return name in self.tensors and self.tensors[name].dtype.name in _TYPES[self.scheme.kind]

    def read(self, name: str, out: np.ndarray) -> None:
        """As `Shards.read`; scales are multiplied in."""
        if self.is_quantized(name):
            x = self.get(name)
            if x.size != out.size:
                raise self._misshapen(name, x.shape, out.shape)
            out[...] = x.reshape(out.shape).astype(out.dtype)
        else:
            super().read(name, out)

    def get(self, name: str) -> np.ndarray:
        """As `Shards.get`, but float32 where the tensor is stored in eight bits.

        Raises:
            CheckpointError: its scales are missing, misshapen or not finite; a value is NaN.
        """
        raw = self._raw(name)
        if not self.is_quantized(name):
            return raw
        x = raw.astype(np.float32) * self._scales(name, raw.shape)
        if not np.isfinite(x).all():
            raise CheckpointError(f"{name} holds NaN or infinity; it cannot be served")
        return x

    def read_int8(self, name: str, out: EightBits) -> None:
        """Fills `out`, whose scale has one axis less for each axis that is contracted."""
        raw = self._raw(name)
        if raw.size != out.values.size or raw.shape[0] != out.scale.size:
            raise self._misshapen(name, raw.shape, out.values.shape)
        out.values[...] = raw.reshape(out.values.shape)
        rows = np.broadcast_to(self._scales(name, raw.shape), (raw.shape[0], 1))
        out.scale[...] = rows.reshape(out.scale.shape)

    def _raw(self, name: str) -> np.ndarray:
        """A tensor as it is stored."""
        tensor = self._find(name)
        out = np.empty(tensor.shape, tensor.dtype)
        super().read(name, out)
        return out

    def _scales(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The scales of a tensor [N, K], of a shape that multiplies it."""
        key = name + self.scheme.scale
        if key not in self.tensors:
            raise CheckpointError(f"{name} is stored in eight bits, but {key} is missing")
        scale = self._raw(key).astype(np.float32)
        if self.scheme.block is not None:
            rows, cols = self.scheme.block
            expected = (-(-shape[0] // rows), -(-shape[-1] // cols))
            if scale.shape != expected:
                raise self._misshapen(key, scale.shape, expected)
            return np.repeat(np.repeat(scale, rows, 0), cols, 1)[: shape[0], : shape[-1]]
        if scale.size not in (1, shape[0]):
            raise self._misshapen(key, scale.shape, (shape[0], 1))
        return scale.reshape(-1, 1)

    def _misshapen(self, name: str, seen: Any, wanted: Any) -> CheckpointError:
        return CheckpointError(f"{name} has shape {list(seen)}; expected {list(wanted)}")
