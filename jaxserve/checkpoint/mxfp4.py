"""MXFP4 (OCP Microscaling Formats, 2023): blocks of 32 four-bit floats that share an exponent."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np

from jaxserve.errors import CheckpointError

_POSITIVE = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]  # e2m1 without its sign
_NIBBLE = np.array([*_POSITIVE, *(-x for x in _POSITIVE)], np.float32)
_BYTE = np.stack([np.tile(_NIBBLE, 16), np.repeat(_NIBBLE, 16)], -1)  # [256, 2], low nibble first
_LARGEST = 252  # 6 * 2 ** (252 - 127) is the last that float32 and bfloat16 hold


def dequantize(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Values [..., G * 32] bfloat16, exactly, of blocks [..., G, 16] with exponents [..., G].

    Both are uint8; byte i of a block holds values 2i and 2i + 1, and a scale s means 2^(s - 127).
    """
    exponent = scales.astype(np.int32)[..., None, None] - 127
    values = np.ldexp(_BYTE[blocks], exponent).astype(ml_dtypes.bfloat16)
    return values.reshape(*blocks.shape[:-2], -1)


def read(get: Callable[[str], np.ndarray], name: str, rows: slice) -> np.ndarray:
    """The given rows of every expert of `{name}_blocks` and `{name}_scales`: [E, rows, in].

    One expert at a time is widened, so that a layer takes its own size and no more.

    Raises:
        CheckpointError: the two do not fit each other, or a value is out of range.
    """
    blocks, scales = get(f"{name}_blocks"), get(f"{name}_scales")
    if blocks.dtype != np.uint8 or blocks.ndim != 4 or blocks.shape != (*scales.shape, 16):
        raise CheckpointError(
            f"{name}_blocks is {blocks.dtype} {list(blocks.shape)}; MXFP4 asks for uint8 "
            f"{[*scales.shape, 16]}, by the shape of {name}_scales"
        )
    if scales.dtype != np.uint8:
        raise CheckpointError(
            f"{name}_scales is {scales.dtype} {list(scales.shape)}; MXFP4 asks for uint8"
        )
    if scales.max(initial=0) > _LARGEST:
        raise CheckpointError(f"{name}_scales holds NaN or an exponent over {_LARGEST - 127}")
    blocks, scales = blocks[:, rows], scales[:, rows]
    out = np.empty((*scales.shape[:2], scales.shape[2] * 32), ml_dtypes.bfloat16)
    for expert in range(len(out)):
        out[expert] = dequantize(blocks[expert], scales[expert])
    return out
