"""Reads tensors out of safetensors shards, straight into the buffers that will hold them.

Own reader: the package reads neither float8 without torch nor into memory that already exists, and
a memory map counts twice against the host memory that loading may take.
"""

from __future__ import annotations

import json
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxserve.errors import CheckpointError

DTYPES: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8,
    "BOOL": np.bool_,
}  # fmt: skip
_CHUNK = 1 << 22  # elements converted at a time, so that a cast needs no second tensor


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies."""

    path: Path
    dtype: Any
    shape: tuple[int, ...]
    start: int
    nbytes: int


class Shards:
    """All tensors of a folder, by name, and the names of those that were asked for.

    Raises:
        CheckpointError: no shard, a missing one, or one shorter than its header promises.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.tensors: dict[str, Tensor] = {}
        self.asked: set[str] = set()
        for path in _paths(folder):
            self.tensors.update(_header(path))

    def read(self, name: str, out: np.ndarray) -> None:
        """Fills `out` with a tensor, cast to its type.

        Raises:
            CheckpointError: no such tensor, one of another shape, NaN or infinity in it.
        """
        t = self._find(name)
        count = out.size
        if not splits(t.shape, out.shape):
            raise CheckpointError(
                f"{name} in {t.path.name} has shape {list(t.shape)}, "
                f"but config.json asks for {list(out.shape)}"
            )
        if t.dtype != out.dtype and t.dtype.name not in FLOATS:
            raise CheckpointError(
                f"{name} in {t.path.name} has type {t.dtype.name} and shape {list(t.shape)}, and "
                "no quantization_config in config.json explains it; take the checkpoint in floats"
            )
        flat = out.reshape(-1)
        with t.path.open("rb") as file:
            file.seek(t.start)
            for i in range(0, count, _CHUNK):
                part = flat[i : i + _CHUNK]
                raw = part if t.dtype == out.dtype else np.empty(part.size, t.dtype)
                if file.readinto(raw.view(np.uint8).data) != raw.nbytes:
                    raise CheckpointError(f"{t.path} ends within {name}; download it again")
                if not _finite(raw):
                    raise CheckpointError(
                        f"{name} in {t.path.name} holds NaN or infinity; it cannot be served"
                    )
                if raw is not part:
                    with np.errstate(over="ignore"):
                        part[...] = raw.astype(out.dtype)
                    if not _finite(part):
                        raise CheckpointError(
                            f"{name} in {t.path.name} exceeds {out.dtype.name}; "
                            "load it as bfloat16 or float32"
                        )

    def get(self, name: str) -> np.ndarray:
        """A tensor in its own type and shape."""
        t = self._find(name)
        out = np.empty(t.shape, t.dtype)
        self.read(name, out)
        return out

    def _find(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder} has no tensor {name!r}{self._instead(name)}")
        self.asked.add(name)
        return self.tensors[name]

    def _instead(self, name: str) -> str:
        """Why a tensor may be missing: it is packed, or one holds it for all experts."""
        packed = [name.removesuffix("weight") + part for part in ("qweight", "weight_packed")]
        if found := [key for key in packed if key in self.tensors and name.endswith("weight")]:
            return (
                f", but {self._seen(found[0])}: weights that are packed in fewer bits (GPTQ, AWQ) "
                "are not supported; take the checkpoint in floats"
            )
        module = re.match(r".*\bexperts\.(?=\d+\.)", name)
        of_all = re.compile(re.escape(module[0]) + r"[a-z]\w*$") if module else None
        found = [key for key in sorted(self.tensors) if of_all and of_all.match(key)]
        if not found:
            return "; the checkpoint does not fit its config.json"
        return (
            f", but {', '.join(map(self._seen, found))}: tensors of all experts are not read for "
            "this family; save them one by one, as save_pretrained of transformers does by default"
        )

    def _seen(self, name: str) -> str:
        tensor = self.tensors[name]
        return f"{name} {tensor.dtype.name} {list(tensor.shape)}"


def _paths(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            if not all(isinstance(name, str) for name in names):
                raise TypeError(names)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{index} is damaged: {error!r}; download it again") from None
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise CheckpointError(
                f"{folder} lacks {len(missing)} of {len(names)} shards: {', '.join(missing[:4])}"
            )
        return [folder / name for name in names]
    if paths := sorted(folder.glob("*.safetensors")):
        return paths
    raise CheckpointError(
        f"{folder} has no *.safetensors file; convert other formats to safetensors first"
    )


def _header(path: Path) -> dict[str, Tensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > size - 8:
            raise CheckpointError(
                f"{path} is truncated or no safetensors file: {size} bytes; download it again"
            )
        try:
            entries = dict(json.loads(file.read(length)))
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path} has a damaged header: {error}; download it again"
            ) from None
    entries.pop("__metadata__", None)
    return {name: _tensor(path, name, entry, 8 + length, size) for name, entry in entries.items()}


def _tensor(path: Path, name: str, entry: Any, base: int, size: int) -> Tensor:
    try:
        kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if not isinstance(kind, str) or any(type(n) is not int for n in (*shape, begin, end)):
            raise TypeError(entry)
        count, sane = math.prod(shape), min(*shape, begin, end - begin) >= 0
    except (KeyError, TypeError, ValueError):
        raise _damaged(path, name, entry) from None
    if kind not in DTYPES:
        raise CheckpointError(f"{name} in {path.name} has type {kind}; known: {', '.join(DTYPES)}")
    if not sane or count * np.dtype(DTYPES[kind]).itemsize != end - begin:
        raise _damaged(path, name, entry)
    if base + end > size:
        raise CheckpointError(
            f"{path} is truncated: {name} ends at byte {base + end} of {size}; download it again"
        )
    return Tensor(path, np.dtype(DTYPES[kind]), shape, base + begin, end - begin)


def _damaged(path: Path, name: str, entry: Any) -> CheckpointError:
    return CheckpointError(f"{name} in {path.name} has a damaged entry {entry}; download it again")


def splits(stored: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether `wanted` is `stored` with axes split, as [N * H, D] is into [N, H, D]."""
    for size in stored:
        if size == 1:  # nothing to split
            if wanted[:1] not in ((), (1,)):
                return False
            wanted = wanted[1:]
            continue
        product, used = 1, 0
        while used < len(wanted) and product < size:
            product, used = product * wanted[used], used + 1
        if product != size:
            return False
        wanted = wanted[used:]
    return int(np.prod(wanted)) == 1


FLOATS = {
    "float64": (np.uint64, 0x7FF0000000000000),
    "float32": (np.uint32, 0x7F800000),
    "bfloat16": (np.uint16, 0x7F80),
    "float16": (np.uint16, 0x7C00),
}
"""Types that are cast to others -> an integer as wide, and where it holds the exponent."""


def _finite(x: np.ndarray) -> bool:
    """Whether a flat array of floats has neither NaN nor infinity, by its exponent bits."""
    if x.dtype.name not in FLOATS:
        return True
    bits, mask = FLOATS[x.dtype.name]
    return not np.any((x.view(bits) & bits(mask)) == mask)
