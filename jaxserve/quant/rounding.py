"""Rounds a matrix [N, K] to int8 given inputs [n, K] of it, both float32.

`round_matrix` tries what the measures offer and takes for each row what leaves the smallest output
error, so that none is larger than rounding to the nearest leaves it. It is given inputs as they
are; the functions below it take them as a product sees them, each row rounded to eight bits.
"""

from __future__ import annotations

import numpy as np

from jaxserve.quant.rows import dequantize_rows, quantize_rows
from kernels_pallas.weight import Int8Weight

CLIPS = (*(1 - 0.01 * i for i in range(16)), 0.8, 0.75, 0.7, 0.65, 0.6)
"""Shares of the largest weight that become 127; the first is no clipping."""

_DAMPING = 0.01  # of the mean of the Hessian's diagonal: inputs may be fewer than columns
_BLOCK = 128  # columns whose errors are handed on together


def rounded_rows(x: np.ndarray) -> np.ndarray:
    """Rows [..., K] rounded to eight bits, as the floats that these stand for."""
    return dequantize_rows(*quantize_rows(x))


def output_error(change: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """Squared error of every output [N] when a matrix changes by `change`, over all inputs."""
    return np.square(change @ inputs.T).sum(-1)


def condensed(inputs: np.ndarray) -> np.ndarray:
    """At most K rows whose `output_error` is that of all of them, for every change."""
    if len(inputs) <= inputs.shape[1]:
        return inputs
    return np.asarray(np.linalg.qr(inputs, mode="r"))


def plain(w: np.ndarray, per_channel: bool = True) -> Int8Weight:
    """The nearest matrix whose largest weight, of each row or of all, is 127."""
    if per_channel:
        return Int8Weight(*quantize_rows(w))
    values, scale = quantize_rows(w.reshape(1, -1))
    return Int8Weight(values.reshape(w.shape), np.repeat(scale, len(w)))


def nearest(w: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """int8 values of a matrix for scales [N], cut where these are too small."""
    steps = np.where(scale > 0, scale, 1.0)[:, None]
    return np.clip(np.rint(w / steps), -127, 127).astype(np.int8)


def clipped_scale(w: np.ndarray, inputs: np.ndarray, per_channel: bool = True) -> np.ndarray:
    """Scales [N], each the best of `CLIPS` for its row (or of all rows alike)."""
    scale = plain(w, per_channel).scale
    scales = [np.float32(clip) * scale for clip in CLIPS]
    errors = np.stack([output_error(dequantize_rows(nearest(w, s), s) - w, inputs) for s in scales])
    if not per_channel:
        errors = np.broadcast_to(errors.sum(1, keepdims=True), errors.shape)
    return np.stack(scales)[errors.argmin(0), np.arange(len(w))]


def compensated(w: np.ndarray, scale: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """int8 values for scales [N], with the error of each column made good by those that follow.

    Columns are rounded one after another, those that weigh most first, and what a column's rounding
    adds to the outputs is taken out by a change of the columns that are still free (optimal brain
    surgery; Frantar et al., 2023). That is a gain for most rows, not for all.
    """
    hessian = (inputs.T @ inputs).astype(np.float64)
    weighs = np.diag(hessian)
    order = np.argsort(-weighs, kind="stable")
    damping = _DAMPING * weighs.mean() + 1e-12
    inverse = np.linalg.inv(hessian[np.ix_(order, order)] + damping * np.eye(len(order)))
    factor = np.linalg.cholesky(inverse).T.astype(np.float32)  # upper
    values = np.empty(w.shape, np.int8)
    values[:, order] = _fed_back(w[:, order], scale, factor)
    return values


def _fed_back(w: np.ndarray, scale: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Rounds column by column; `factor` is the upper Cholesky factor of the inverse Hessian."""
    w, values = w.copy(), np.empty(w.shape, np.int8)
    for start in range(0, w.shape[1], _BLOCK):
        stop = min(start + _BLOCK, w.shape[1])
        errors = np.empty((len(w), stop - start), np.float32)
        for j in range(start, stop):
            column = nearest(w[:, j : j + 1], scale)
            values[:, j : j + 1] = column
            error = (w[:, j] - dequantize_rows(column, scale)[:, 0]) / factor[j, j]
            w[:, j + 1 : stop] -= np.outer(error, factor[j, j + 1 : stop])
            errors[:, j - start] = error
        w[:, stop:] -= errors @ factor[start:stop, stop:]
    return values


def round_matrix(
    w: np.ndarray,
    inputs: np.ndarray | None,
    *,
    per_channel: bool = True,
    clipping: bool = True,
    compensation: bool = True,
) -> Int8Weight:
    """A matrix in eight bits: values [N, K] and scales [N].

    Args:
        inputs: rows that it meets, as they are; None rounds to the nearest.
    """
    found = [plain(w, per_channel)]
    if inputs is None or not (clipping or compensation):
        return found[0]
    inputs = condensed(rounded_rows(inputs))
    if clipping:
        scale = clipped_scale(w, inputs, per_channel)
        found.append(Int8Weight(nearest(w, scale), scale))
    scales = [f.scale for f in found]
    if compensation:  # where it presses weights beyond a clipped range, the whole one is better
        found += [Int8Weight(compensated(w, scale, inputs), scale) for scale in scales]
    return _best_rows(w, found, inputs, per_channel)


def _best_rows(
    w: np.ndarray, found: list[Int8Weight], inputs: np.ndarray, per_channel: bool
) -> Int8Weight:
    """Each row as the candidate has it that leaves the smallest error; the first of equals."""
    errors = np.stack([output_error(dequantize_rows(f.values, f.scale) - w, inputs) for f in found])
    if not per_channel:
        return found[int(errors.sum(1).argmin())]
    best, row = errors.argmin(0), np.arange(len(w))
    values, scales = (np.stack([getattr(f, k) for f in found]) for k in ("values", "scale"))
    return Int8Weight(values[best, row], scales[best, row])
