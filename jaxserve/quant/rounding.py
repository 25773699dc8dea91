"""Rounding a matrix to eight bits with an eye on the inputs that it meets.

Matrices are [N, K] and inputs [n, K], float32. Every function takes the inputs as a product sees
them, each row rounded to eight bits, and none makes the output error of any row of the matrix
larger than rounding to the nearest leaves it.
"""

from __future__ import annotations

import numpy as np

from kernels_pallas.weight import Int8Weight

CLIPS = (*(1 - 0.01 * i for i in range(16)), 0.8, 0.75, 0.7, 0.65, 0.6)
"""Shares of the largest weight that become 127; the first is no clipping."""

_DAMPING = 0.01  # of the mean of the Hessian's diagonal: inputs may be fewer than columns
_BLOCK = 128  # columns whose errors are handed on together


def rounded_rows(x: np.ndarray) -> np.ndarray:
    """Rows as `kernels_pallas.quantize.quantize_rows` leaves them, in floats."""
    scale = np.abs(x).max(-1, keepdims=True) / 127.0
    return (np.rint(x / np.where(scale > 0, scale, 1.0)) * scale).astype(np.float32)


def output_error(change: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """Squared error of every output [N] when a matrix changes by `change`, over all inputs."""
    return np.square(change @ inputs.T).sum(-1)


def condensed(inputs: np.ndarray) -> np.ndarray:
    """At most K rows whose `output_error` is that of all of them, for every change."""
    if len(inputs) <= inputs.shape[1]:
        return inputs
    return np.asarray(np.linalg.qr(inputs, mode="r"))


def nearest(w: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """int8 values of a matrix for scales [N]."""
    steps = np.where(scale > 0, scale, 1.0)[:, None]
    return np.clip(np.rint(w / steps), -127, 127).astype(np.int8)


def plain_scale(w: np.ndarray, per_channel: bool = True) -> np.ndarray:
    """Scales [N] with which the largest weight becomes 127."""
    top = np.abs(w).max(-1)
    return (top if per_channel else np.full_like(top, top.max())).astype(np.float32) / 127.0


def clipped_scale(w: np.ndarray, inputs: np.ndarray, per_channel: bool = True) -> np.ndarray:
    """Scales [N], each the best of `CLIPS` for its row (or of all rows alike)."""
    scale = plain_scale(w, per_channel)
    errors = np.stack(
        [output_error(dequantized(nearest(w, c * scale), c * scale) - w, inputs) for c in CLIPS]
    )
    if not per_channel:
        errors = np.broadcast_to(errors.sum(1, keepdims=True), errors.shape)
    return (np.asarray(CLIPS)[errors.argmin(0)] * scale).astype(np.float32)


def dequantized(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return values.astype(np.float32) * scale[:, None]


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
            error = (w[:, j] - dequantized(column, scale)[:, 0]) / factor[j, j]
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
    plain = plain_scale(w, per_channel)
    if inputs is None or not (clipping or compensation):
        return Int8Weight(nearest(w, plain), plain)
    inputs = condensed(rounded_rows(inputs))
    scales = [plain, clipped_scale(w, inputs, per_channel)] if clipping else [plain]
    found = [Int8Weight(nearest(w, scale), scale) for scale in scales]
    if compensation:  # where it presses weights beyond a clipped range, the whole one is better
        found += [Int8Weight(compensated(w, scale, inputs), scale) for scale in scales]
    return _best_rows(w, found, inputs, per_channel)


def _best_rows(
    w: np.ndarray, found: list[Int8Weight], inputs: np.ndarray, per_channel: bool
) -> Int8Weight:
    """Each row as the candidate has it that leaves the smallest error; the first of equals."""
    errors = np.stack([output_error(dequantized(f.values, f.scale) - w, inputs) for f in found])
    if not per_channel:
        return found[int(errors.sum(1).argmin())]
    best, row = errors.argmin(0), np.arange(len(w))
    values, scales = (np.stack([getattr(f, k) for f in found]) for k in ("values", "scale"))
    return Int8Weight(values[best, row], scales[best, row])
