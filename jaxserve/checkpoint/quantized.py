"""Reads checkpoints whose large weights are stored in eight bits, each with scales beside it."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxserve.checkpoint.safetensors import FLOATS, Shards, splits
from jaxserve.checkpoint.schemes import Scheme
from jaxserve.errors import CheckpointError
from kernels_pallas.weight import Int8Weight

log = logging.getLogger(__name__)

_E4M3, _E5M2 = "float8_e4m3fn", "float8_e5m2"
_TYPES = {"int8": ("int8",), "fp8": (_E4M3, _E5M2), "e4m3": (_E4M3,), "e5m2": (_E5M2,)}
_SCALE_TYPES = (*FLOATS, "float8_e8m0fnu")
_ACTIVATIONS = (".input_scale", ".activation_scale")  # vLLM's name, and transformers'
_CHUNK = 1 << 20  # elements that are floats at a time: a whole matrix takes four times its bytes


class _Scales(NamedTuple):
    """Of a matrix [N, K]: float32 [ceil(N / n), ceil(K / k)], and the tile (n, k) of each."""

    values: np.ndarray
    tile: tuple[int, int]

    def of_rows(self, start: int, stop: int, width: int) -> np.ndarray:
        """What multiplies these rows: [stop - start, width], or one for each."""
        rows = self.values[np.arange(start, stop) // self.tile[0]]
        return rows if rows.shape[1] == 1 else rows.repeat(self.tile[1], 1)[:, :width]


class QuantizedShards(Shards):
    """Tensors of which some are stored in eight bits; they are read as floats, or as they are."""

    def __init__(self, folder: Path, scheme: Scheme):
        super().__init__(folder)
        self.scheme = scheme
        static = sorted(name for name in self.tensors if name.endswith(_ACTIVATIONS))
        if static:
            log.warning(
                "%s: %d scales of activations, such as %s, are not used: here activations stay in "
                "floats, or get a scale for each token", folder, len(static), static[0],
            )  # fmt: skip

    def has_rows_of_int8(self, name: str) -> bool:
        """Whether `read_int8` can be used: the tensor is int8, and every scale is that of rows."""
        plain = self.scheme.kind == "int8" and self.scheme.block is None
        return plain and self.is_stored_in_eight_bits(name)

    def is_stored_in_eight_bits(self, name: str) -> bool:
        """Whether a tensor is of the type that config.json declares."""
        return (
            name in self.tensors and self.tensors[name].dtype.name in _TYPES[self.scheme.declared]
        )

    def read(self, name: str, out: np.ndarray) -> None:
        """As `Shards.read`; scales are multiplied in.

        Raises:
            CheckpointError: a tensor or its scales are missing, misshapen, of a type that
                config.json does not speak of, or out of range.
        """
        if not self.is_stored_in_eight_bits(name):
            self._check_float(name)
            return super().read(name, out)
        shape = self._matrix(name, out.shape)
        self._widen(name, *self._stored(name, shape), out.reshape(shape))

    def get(self, name: str) -> np.ndarray:
        """As `Shards.get`, but float32 where the tensor is stored in eight bits."""
        tensor = self._find(name)
        stored = self.is_stored_in_eight_bits(name)
        out = np.empty(tensor.shape, np.float32 if stored else tensor.dtype)
        self.read(name, out)
        return out

    def read_int8(self, name: str, out: Int8Weight) -> None:
        """Fills `out`, numpy arrays int8 [*out, in] and float32 [*out], with what is stored.

        Raises:
            CheckpointError: as `read`, or the largest product exceeds float32.
        """
        shape = self._matrix(name, out.values.shape)
        if shape[0] != out.scale.size:
            raise _misshapen(name, shape, out.values.shape)
        raw, scales = self._stored(name, shape)
        out.values[...] = raw.reshape(out.values.shape)
        rows = np.broadcast_to(scales.of_rows(0, shape[0], 1), (shape[0], 1))
        if rows.max(initial=0) > float(np.finfo(np.float32).max) / 128:
            raise CheckpointError(f"{name} times {self._scale_name(name)} exceeds float32")
        out.scale[...] = rows.reshape(out.scale.shape)

    def _matrix(self, name: str, wanted: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a stored matrix, of which `wanted` splits axes."""
        tensor = self._find(name)
        if len(tensor.shape) != 2:
            raise CheckpointError(
                f"{name} in {tensor.path.name} is {tensor.dtype.name} {list(tensor.shape)}; "
                f"only matrices can be stored in eight bits, and {list(wanted)} is expected"
            )
        if not splits(tensor.shape, wanted):
            raise _misshapen(name, tensor.shape, wanted)
        return tensor.shape

    def _widen(self, name: str, raw: np.ndarray, scales: _Scales, out: np.ndarray) -> None:
        """out = raw * scales, by rows."""
        width, most = raw.shape[1], float(ml_dtypes.finfo(out.dtype).max)
        step = max(1, _CHUNK // max(1, width))
        for i in range(0, len(raw), step):
            part = _floats(raw[i : i + step])
            with np.errstate(over="ignore", invalid="ignore"):  # looked for below
                part *= scales.of_rows(i, i + len(part), width)
            top = np.abs(part).max(initial=0)
            if not np.isfinite(top):
                raise CheckpointError(f"{name} holds NaN or infinity; it cannot be served")
            if top > most:
                raise CheckpointError(
                    f"{name} exceeds {out.dtype.name}; load it as bfloat16 or float32"
                )
            out[i : i + step] = part.astype(out.dtype)

    def _check_float(self, name: str) -> None:
        """Refuses a tensor that config.json, or what lies beside it, says is something else."""
        tensor, declared = self._find(name), self.scheme.declared
        seen = f"{name} in {tensor.path.name} is {tensor.dtype.name} {list(tensor.shape)}"
        if any(tensor.dtype.name in types for types in _TYPES.values()):
            raise CheckpointError(f"{seen}, but quantization_config says {declared}")
        if key := self._scale_name(name):
            raise CheckpointError(f"{seen}, but {key} lies beside it; expected {declared}")

    def _raw(self, name: str) -> np.ndarray:
        """A tensor as it is stored."""
        tensor = self._find(name)
        out = np.empty(tensor.shape, tensor.dtype)
        super().read(name, out)
        return out

    def _scale_name(self, name: str) -> str | None:
        found = (name + suffix for suffix in self.scheme.scales)
        return next((key for key in found if key in self.tensors), None)

    def _stored(self, name: str, shape: tuple[int, ...]) -> tuple[np.ndarray, _Scales]:
        """A matrix as it is stored, and its scales; what else lies beside it is looked at."""
        raw, scales = self._raw(name), self._scales(name, shape)
        self._check_zero_scales(name, raw, scales)
        self._check_zero_point(name)
        self._check_activations(name)
        return raw, scales

    def _scales(self, name: str, shape: tuple[int, ...]) -> _Scales:
        """The scales of a matrix of that shape; each is a number from 0."""
        if (key := self._scale_name(name)) is None:
            keys = " or ".join(name + suffix for suffix in self.scheme.scales)
            raise CheckpointError(f"{name} is stored in eight bits, but {keys} is missing")
        stored, (rows, cols) = self._find(key), shape
        block, scale_type = self.scheme.block, stored.dtype.name
        if scale_type not in _SCALE_TYPES:
            raise CheckpointError(f"{key} is {scale_type}; expected {', '.join(_SCALE_TYPES)}")
        tiles = (rows, 1) if block is None else (-(-rows // block[0]), -(-cols // block[1]))
        # modelopt keeps axes of 1 behind both numbers of blocks
        by_block = block is not None and stored.shape in (tiles, (tiles[0], 1, tiles[1], 1))
        known = {rows} if self.scheme.by_row else set()
        known |= {1} if self.scheme.by_tensor else set()
        count = max(stored.shape, default=1)  # of the one axis that is not 1
        if not by_block and not (count == math.prod(stored.shape) and count in known):
            raise _misshapen(key, stored.shape, (1,) if known == {1} else tiles)
        with np.errstate(over="ignore"):  # looked for below
            scale = self._raw(key).astype(np.float32)
        if not np.all(np.isfinite(scale) & (scale >= 0)):
            raise CheckpointError(f"{key} holds a scale that is NaN, infinite or below 0")
        if by_block:
            assert block is not None
            return _Scales(scale.reshape(tiles), block)
        return _Scales(scale.reshape(-1, 1), (1 if count == rows else rows, cols))

    def _check_zero_scales(self, name: str, raw: np.ndarray, scales: _Scales) -> None:
        """A scale of 0 makes zeros of what it multiplies, which were zeros before, or are lost."""
        (n, k) = scales.tile
        for i, j in np.argwhere(scales.values == 0):
            tile = raw[i * n : (i + 1) * n, j * k : (j + 1) * k]
            if np.any(_floats(tile)):
                raise CheckpointError(
                    f"{self._scale_name(name)} {list(scales.values.shape)} is 0 at [{i}, {j}], "
                    f"where {name} {list(raw.shape)} is not; expected a scale above 0"
                )

    def _check_activations(self, name: str) -> None:
        """Activation scales are ignored, but a malformed one means a damaged checkpoint."""
        for key in (name.removesuffix(".weight") + suffix for suffix in _ACTIVATIONS):
            if key not in self.tensors:
                continue
            stored = self._find(key)
            seen = f"{key} is {stored.dtype.name} {list(stored.shape)}"
            if stored.dtype.name not in _SCALE_TYPES or math.prod(stored.shape) != 1:
                raise CheckpointError(f"{seen}; expected one number, float32 [1]")
            if not np.isfinite(scale := float(self._raw(key).reshape(()))) or scale < 0:
                raise CheckpointError(f"{seen} and holds {scale}; expected a number from 0")

    def _check_zero_point(self, name: str) -> None:
        """Symmetric weights may come with zeros for zero points, as old exporters wrote them."""
        key = f"{name}_zero_point"
        if key in self.tensors and np.any(self._raw(key).astype(np.float32)):
            raise CheckpointError(f"{key} is not 0, but quantization_config says symmetric")


def _floats(x: np.ndarray) -> np.ndarray:
    """float32 of what has eight bits; float8 by a table, as its cast takes four times as long."""
    if x.dtype == np.int8:
        return x.astype(np.float32)
    table = np.arange(256, dtype=np.uint8).view(x.dtype).astype(np.float32)
    return np.take(table, x.view(np.uint8), out=np.empty(x.shape, np.float32), mode="wrap")


def _misshapen(name: str, seen: Any, wanted: Any) -> CheckpointError:
    return CheckpointError(f"{name} has shape {list(seen)}; expected {list(wanted)}")
