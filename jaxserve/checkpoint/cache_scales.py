"""Scales of an eight-bit cache, calibrated offline and kept beside a checkpoint's weights.

They have a file of their own, which other readers of the folder pass over: no common format has a
scale for each lane.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.errors import CheckpointError

FILE = "kv_cache_scales.npz"


def save(folder: Path, scales: Mapping[str, np.ndarray]) -> None:
    """Writes "k" [L, K, H] and, unless values are lanes of keys, "v" [L, K, Hv]."""
    arrays: dict[str, Any] = {name: np.asarray(x, np.float32) for name, x in scales.items()}
    np.savez(folder / FILE, **arrays)


def load(
    folder: Path, num_layers: int, kv_shape: tuple[int, int, int]
) -> tuple[np.ndarray, ...] | None:
    """Scales of keys and of values, as far as there are any; None if nobody has calibrated.

    Args:
        kv_shape: KV heads, and lanes of a key and of a value (0: values are lanes of keys).

    Raises:
        CheckpointError: the file is damaged, or of another model.
    """
    if not (folder / FILE).exists():
        return None
    if not zipfile.is_zipfile(folder / FILE):
        raise CheckpointError(f"{folder / FILE} is damaged: no zip archive; remove it")
    heads, *lanes = kv_shape
    wanted = {k: (num_layers, heads, n) for k, n in zip("kv", lanes, strict=True) if n}
    try:
        with np.load(folder / FILE, allow_pickle=False) as stored:
            found = {name: stored[name] for name in stored.files}
    except (EOFError, OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise CheckpointError(f"{folder / FILE} cannot be read ({error}); remove it") from None
    seen = {name: x.shape for name, x in found.items()}
    if seen != wanted:
        raise CheckpointError(f"{folder / FILE} has scales {seen}; expected {wanted}. Remove it")
    numbers = all(np.issubdtype(x.dtype, np.floating) for x in found.values())
    if not numbers or not all(np.isfinite(x).all() and (x >= 0).all() for x in found.values()):
        raise CheckpointError(f"{folder / FILE} has scales that are no numbers from 0; remove it")
    return tuple(found[name].astype(np.float32) for name in wanted)
