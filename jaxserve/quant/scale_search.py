"""Scales that move a product's range from activations to weights, or back, without changing it.

W x = (W s)(x / s). Dividing x by s costs nothing where it can be folded into what makes x: a norm's
scales, the rows of the matrix before, the values of a head. s is searched along the line between
"activations are flat" and "weights are flat" (Xiao et al., 2023; Lin et al., 2024) for the smallest
error of the outputs that eight bits on both sides leave. Outlier channels of activations, which
would take the bits of all others, are thereby folded away too.

Scales are powers of two, so that folding them is exact in every float type: the model in floats
says the same to the bit, and what stays in bfloat16, such as a router, is not rounded once more.
Norms that store their distance from one (Gemma) are the exception: near -1 bfloat16 has steps of
2^-8 only. There a scale is what the stored norm has given up, whatever that is, so that readers
take just that; it is exact up to the rounding of float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from jaxserve.quant.leaves import Layer, Leaves, readers
from jaxserve.quant.record import Inputs
from jaxserve.quant.rounding import plain, rounded_rows
from jaxserve.quant.rows import dequantize_rows

ALPHAS = tuple(0.1 * i for i in range(11))
_ROWS = 256  # inputs that a candidate is judged by


@dataclass(frozen=True)
class Product:
    """A matrix [N, K] and inputs [n, K] of it."""

    matrix: np.ndarray
    inputs: np.ndarray

    def error(self, s: np.ndarray, per_channel: bool = True) -> float:
        """|Q(W s) Q(x / s) - W x|^2 over |W x|^2."""
        w = self.matrix * s
        rounded = plain(w, per_channel)
        w = dequantize_rows(rounded.values, rounded.scale)
        found = rounded_rows(self.inputs / s) @ w.T
        power = max(float(np.square(self.outputs).sum()), 1e-30)
        return float(np.square(found - self.outputs).sum()) / power

    @cached_property
    def outputs(self) -> np.ndarray:
        return self.inputs @ self.matrix.T


def best_scale(
    products: list[Product],
    spread: Callable[[np.ndarray], np.ndarray] = lambda x: x,
    per_channel: bool = True,
) -> np.ndarray:
    """The scale [K] with the smallest sum of errors; ones where nothing is better.

    Args:
        spread: makes channels that must share a scale equal, by the largest of them.
    """
    inputs = spread(np.max([np.abs(p.inputs).max(0) for p in products], 0))
    weights = spread(np.max([np.abs(p.matrix).max(0) for p in products], 0))
    used = (inputs > 0) & (weights > 0)
    few = [Product(p.matrix, p.inputs[:_ROWS]) for p in products]
    candidates = [np.ones(len(used), np.float32)]
    candidates += [_candidate(inputs, weights, used, alpha) for alpha in ALPHAS]
    errors = [sum(p.error(s, per_channel) for p in few) for s in candidates]
    return candidates[int(np.argmin(errors))]


def _candidate(
    inputs: np.ndarray, weights: np.ndarray, used: np.ndarray, alpha: float
) -> np.ndarray:
    s = np.ones(len(used))
    if used.any():
        log = alpha * np.log(inputs[used]) - (1 - alpha) * np.log(weights[used])
        s[used] = 2.0 ** np.rint(np.clip((log - log.mean()) / np.log(2), -14, 14))
    return s.astype(np.float32)


def divided(
    norm: np.ndarray, s: np.ndarray, offset: float, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """A norm [K] that multiplies by offset + norm, divided by about s; and the exact divisor [K].

    Both are float32, and `dtype` holds the norm as it is. A channel that multiplies by 0 stays so.
    """
    whole = offset + norm
    stored = (whole / s - offset).astype(dtype)
    zero = np.asarray(-offset, dtype)
    least = np.nextafter(zero, (np.sign(whole) - offset).astype(dtype))  # a quotient is never 0
    stored = np.where((stored == zero) & (whole != 0), least, stored)
    stored = np.where((whole == 0) | (s == 1), norm, stored.astype(np.float32))
    quotient = offset + stored
    return stored, np.divide(whole, quotient, out=np.ones_like(whole), where=whole != 0)


def search(leaves: Leaves, inputs: Inputs, i: int, per_channel: bool = True) -> None:
    """Finds and folds the scales of layer i, in place; `inputs` become what they are then."""
    layer, specs = leaves.layers[i], leaves.specs()[i]
    fold = _Fold(layer, inputs, i, per_channel)
    for norm in ("attn_norm", "mlp_norm"):
        fold.norm(norm, readers(norm, specs), leaves.cfg.norm_offset, leaves.dtype)
    if "attn.wq_b" in layer:
        fold.norm("attn.q_norm", ["attn.wq_b"], 0.0, leaves.dtype)
    for part in ("mlp.", "mlp.shared.", "mlp.experts."):
        if part + "w_down" in layer:
            fold.hidden(part)
    fold.values()


@dataclass(frozen=True)
class _Fold:
    """The places of one layer where a scale can go."""

    layer: Layer
    inputs: Inputs
    i: int
    per_channel: bool

    def norm(self, norm: str, names: list[str], offset: float, dtype: np.dtype) -> None:
        """Between a norm and the matrices that read it; a router reads it too, in floats."""
        judged = [name for name in names if name != "mlp.router"]
        s = best_scale([p for n in judged for p in self._products(n)], per_channel=self.per_channel)
        if offset:
            self.layer[norm], s = divided(self.layer[norm], s, offset, dtype)
        else:
            self.layer[norm] = (self.layer[norm] / s).astype(np.float32)
        for name in names:
            self.layer[name] = self.layer[name] * s
        self._divide(names, s)

    def hidden(self, part: str) -> None:
        """Between the two halves of a gated MLP: the linear half takes the scale."""
        up, down, bias = part + "w_up", part + "w_down", part + "b_up"
        if part == "mlp.experts.":
            found = [best_scale([p], per_channel=self.per_channel) for p in self._products(down)]
            s = np.stack(found)
        else:
            s = best_scale(self._products(down), per_channel=self.per_channel)
        self.layer[up] = self.layer[up] / s[..., None]
        self.layer[down] = self.layer[down] * s[..., None, :]
        if bias in self.layer:
            self.layer[bias] = self.layer[bias] / s
        self._divide([down], s)

    def values(self) -> None:
        """Between a head's values and the output: heads that share values share scales."""
        name = "attn.wv" if "attn.wv" in self.layer else "attn.w_uv"
        heads, lanes = self.layer[name].shape[:2]
        shape = (heads, -1, lanes)  # heads of queries for each of values

        def spread(x: np.ndarray) -> np.ndarray:
            x = x.reshape(shape)
            return np.broadcast_to(x.max(1, keepdims=True), x.shape).reshape(-1)

        s = best_scale(self._products("attn.wo"), spread, self.per_channel)
        once = s.reshape(shape)[:, 0]
        self.layer[name] = self.layer[name] / once[..., None]
        if name == "attn.wv" and "attn.bv" in self.layer:
            self.layer["attn.bv"] = self.layer["attn.bv"] / once
        wo = self.layer["attn.wo"]
        self.layer["attn.wo"] = wo * s.reshape(wo.shape[1:])
        self._divide(["attn.wo"], s)

    def _products(self, name: str) -> list[Product]:
        w = self.layer[name]
        if ".experts." in name:
            return [Product(w[e], self.inputs.rows(self.i, name, e)) for e in range(len(w))]
        rows = self.inputs.rows(self.i, name)
        return [Product(w.reshape(-1, rows.shape[1]), rows)]

    def _divide(self, names: list[str], s: np.ndarray) -> None:
        seen: set[int] = set()
        for name in names:
            experts = range(len(self.layer[name])) if ".experts." in name else (None,)
            for e in experts:
                sample = self.inputs.sample(self.i, name, e)
                if id(sample) not in seen:
                    sample.divide(s if e is None or s.ndim == 1 else s[e])
                    seen.add(id(sample))
