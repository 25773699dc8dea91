"""Rows in eight bits on the host, as `kernels_pallas.quantize` has them on a device."""

from __future__ import annotations

import numpy as np


def quantize_rows(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows [..., K] of floats as int8 [..., K] and scales float32 [...].

    To the bit what `kernels_pallas.quantize.quantize_rows` says of finite rows: the largest
    magnitude becomes 127, halves round to even, and a row of zeros has scale 0.
    """
    x = x.astype(np.float32)
    top = np.abs(x).max(-1, keepdims=True)
    steps = np.divide(np.float32(127), top, out=np.zeros_like(top), where=top > 0)
    return np.rint(x * steps).astype(np.int8), top[..., 0] * np.float32(1 / 127)


def dequantize_rows(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The float32 [..., K] that int8 [..., K] with scales [...] stand for."""
    return values.astype(np.float32) * scale[..., None]
