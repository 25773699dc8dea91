"""Rotations that change no output: outliers are spread over channels before anything is rounded.

RMSNorm sees lengths only, so a residual stream may be turned by any orthogonal matrix if whatever
writes to it and whatever reads from it is turned as well (Ashkboos et al., 2024). The norms' own
scales stand in the way and are folded into the readers first. A head's values are turned within the
head: attention mixes tokens, not lanes.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxserve.quant.leaves import Layer, Leaves, readers


def refusal(leaves: Leaves) -> str | None:
    """Why a model cannot be turned; None if it can."""
    known = {"attn_norm", "mlp_norm"}
    for specs in leaves.specs():
        if others := [
            k
            for k, w in specs.items()
            if w.axes[1:] == ("embed",) and "norm" in k and k not in known
        ]:
            return f"{others[0]} scales channels of what is added to the residual stream"
    return None


def rotation(size: int, rng: np.random.Generator) -> np.ndarray:
    """A random orthogonal matrix [size, size] whose rows spread over all columns.

    A Hadamard matrix with random signs, times a random rotation of what is no power of two.
    """
    power = size & -size
    hadamard = np.ones((1, 1))
    while len(hadamard) < power:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    odd = np.linalg.qr(rng.standard_normal((size // power, size // power)))[0]
    signs = rng.choice([-1.0, 1.0], size)
    return signs[:, None] * np.kron(odd, hadamard / power**0.5)


def rotate(leaves: Leaves, seed: int = 0) -> np.ndarray:
    """Turns a model in place. A tied head becomes one of its own, for it reads behind a norm.

    There must be no `refusal`.

    Returns:
        What a matrix [N, embed] that reads the model's last hidden states must be multiplied by,
        [embed, embed], to read the rotated ones.
    """
    rng = np.random.default_rng(seed)
    turn, within = rotation(leaves.cfg.embed, rng), None
    for layer, specs in zip(leaves.layers, leaves.specs(), strict=True):
        for norm in ("attn_norm", "mlp_norm"):
            fold_norm(layer, norm, readers(norm, specs), leaves.cfg.norm_offset)
        for name, w in specs.items():
            axes = w.axes[1:]  # without "layer"
            if w.init != "normal" or "embed" not in axes:
                continue
            layer[name] = _turned(layer[name], turn, axes.index("embed"))
        within = rotation(layer[_values(layer)].shape[1], rng) if within is None else within
        _turn_values(layer, within)
    states = (leaves.cfg.norm_offset + leaves.outer["final_norm"])[:, None] * turn
    _turn_outer(leaves, turn)
    return states


def fold_norm(layer: Layer, norm: str, names: list[str], offset: float) -> None:
    """Moves a norm's scales into the matrices that read it."""
    scale = offset + layer[norm]
    for name in names:
        layer[name] = layer[name] * scale
    layer[norm] = np.full_like(scale, 1.0 - offset)


def _turn_outer(leaves: Leaves, turn: np.ndarray) -> None:
    outer, offset = leaves.outer, leaves.cfg.norm_offset
    if "lm_head" not in outer:
        outer["lm_head"] = outer["embed"]
        leaves.cfg = dataclasses.replace(leaves.cfg, tied=False)
    fold_norm(outer, "final_norm", ["lm_head"], offset)
    for name in ("embed", "lm_head"):
        outer[name] = _turned(outer[name], turn, 1)


def _turn_values(layer: Layer, turn: np.ndarray) -> None:
    """The lanes of each head's values, where they are made and where they are read."""
    wo = layer["attn.wo"]
    heads = wo.reshape(len(wo), -1, len(turn))
    layer["attn.wo"] = _turned(heads, turn, 2).reshape(wo.shape)
    for name in (_values(layer), "attn.bv"):
        if name in layer:
            layer[name] = _turned(layer[name], turn, 1)


def _values(layer: Layer) -> str:
    """The matrix that makes values, [heads, lanes, ...]."""
    return "attn.w_uv" if "attn.w_uv" in layer else "attn.wv"


def _turned(x: np.ndarray, turn: np.ndarray, axis: int) -> np.ndarray:
    """x with one axis times `turn`; in float64, so that nothing but one rounding is lost."""
    y = np.moveaxis(np.moveaxis(x, axis, -1) @ turn, -1, axis)
    return np.ascontiguousarray(y, np.float32)
