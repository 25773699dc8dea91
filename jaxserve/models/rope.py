"""Speeds of rotary position embedding (Su et al., 2021), and its context extensions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxserve.errors import CheckpointError
from kernels_pallas.rope import Table


@dataclass(frozen=True)
class Rope:
    """Rotation speeds, worked out once from a config.

    Attributes:
        inv_freq: radians per position of each rotated pair.
        magnitude: factor on cosine and sine (YaRN's attention factor).
        score_scale: factor on attention scores that DeepSeek's form of YaRN asks for.
    """

    inv_freq: tuple[float, ...]
    magnitude: float = 1.0
    score_scale: float = 1.0

    def tables(self, positions: Array) -> Table:  # [B, T] -> 2 x [B, T, 1, pairs]
        """Cosine and sine for each position, with an axis for heads."""
        speed = jnp.asarray(self.inv_freq, jnp.float32)
        angle = positions[..., None, None].astype(jnp.float32) * speed
        return jnp.cos(angle) * self.magnitude, jnp.sin(angle) * self.magnitude


def from_hf(hf: Mapping[str, Any], head_dim: int, layer_type: str | None = None) -> Rope:
    """Reads both spellings: `rope_parameters`, and `rope_theta` beside `rope_scaling`.

    Args:
        layer_type: which entry of `rope_parameters`, where each kind of layer has its own.

    Raises:
        CheckpointError: a scaling type that is not known, or lanes that make no pairs.
    """
    p = _parameters(hf, layer_type)
    kind = p.get("rope_type", p.get("type", "default"))
    if kind not in _KINDS:
        raise CheckpointError(f"rope_type {kind!r} is not supported; known: {', '.join(_KINDS)}")
    if layer_type is None and any(isinstance(value, Mapping) for value in p.values()):
        raise CheckpointError(
            f"rope_parameters {p} differ by layer type, which this family has not"
        )
    dim = int(head_dim * p.get("partial_rotary_factor", 1.0))
    if dim < 2 or dim % 2:
        raise CheckpointError(
            f"{dim} lanes of a head of {head_dim} are no pairs to rotate: it must be even; "
            "correct head_dim (else hidden_size / num_attention_heads), qk_rope_head_dim or "
            "partial_rotary_factor in config.json"
        )
    freq = float(p["rope_theta"]) ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    return _KINDS[kind](freq, p, hf)


def _parameters(hf: Mapping[str, Any], layer_type: str | None) -> dict[str, Any]:
    p = hf.get("rope_parameters") or {}
    if layer_type is not None and isinstance(p.get(layer_type), Mapping):
        p = p[layer_type]
    old = {"rope_theta": hf.get("rope_theta") or 10_000.0}
    if hf.get("partial_rotary_factor"):
        old["partial_rotary_factor"] = hf["partial_rotary_factor"]
    return {**old, **(hf.get("rope_scaling") or {}), **p}


def _rope(freq: np.ndarray, **scales: float) -> Rope:
    return Rope(tuple(float(f) for f in freq.astype(np.float32)), **scales)


def _default(freq: np.ndarray, p: Mapping[str, Any], hf: Mapping[str, Any]) -> Rope:
    return _rope(freq)


def _linear(freq: np.ndarray, p: Mapping[str, Any], hf: Mapping[str, Any]) -> Rope:
    return _rope(freq / p["factor"])


def _llama3(freq: np.ndarray, p: Mapping[str, Any], hf: Mapping[str, Any]) -> Rope:
    """Slow pairs are slowed by `factor`, fast ones kept, those between blended (Llama 3.1)."""
    turns = p["original_max_position_embeddings"] * freq / (2 * math.pi)
    low, high = p["low_freq_factor"], p["high_freq_factor"]
    if low >= high:
        raise CheckpointError(
            f"low_freq_factor {low} must be below high_freq_factor {high}; correct config.json"
        )
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return _rope(freq * (keep + (1 - keep) / p["factor"]))


def _yarn(freq: np.ndarray, p: Mapping[str, Any], hf: Mapping[str, Any]) -> Rope:
    """YaRN (Peng et al., 2023), with DeepSeek's split of the magnitude."""
    original = p.get("original_max_position_embeddings") or hf["max_position_embeddings"]
    factor = p.get("factor") or hf["max_position_embeddings"] / original
    dim, base = 2 * len(freq), p["rope_theta"]

    def pair_turning(times: float) -> float:
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_turning(p.get("beta_fast") or 32), pair_turning(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    slow = np.clip((np.arange(dim // 2) - low) / ((high - low) or 0.001), 0, 1)

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    mscale, all_dim = p.get("mscale"), p.get("mscale_all_dim")
    scale = p.get("attention_factor")
    if scale is None:
        scale = magnitude(mscale) / magnitude(all_dim) if mscale and all_dim else magnitude(1.0)
    return _rope(
        freq * (1 - slow) + freq / factor * slow,
        magnitude=float(scale),
        score_scale=magnitude(all_dim) ** 2 if all_dim else 1.0,
    )


_KINDS = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn}
