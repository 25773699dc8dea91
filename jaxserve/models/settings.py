"""Reads `config.json` strictly: a setting that nothing here honours is refused, never ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from jaxserve.errors import CheckpointError

T = TypeVar("T")

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""Hugging Face's name of an activation -> its key in `kernels_pallas.linear.GATES`."""


def choice(hf: Mapping[str, Any], key: str, known: Mapping[Any, T], default: Any) -> T:
    """What the value of `key` stands for in `known`; a dotted key looks into a sub-object.

    Raises:
        CheckpointError: it is none of `known`.
    """
    at: Any = hf
    *outer, last = key.split(".")
    for name in outer:
        at = at.get(name) or {}
    value = at.get(last, default)
    if value not in known:
        names = ", ".join(repr(name) for name in known)
        raise CheckpointError(f"{key} {value!r} in config.json is not supported; known: {names}")
    return known[value]


def refuse_quantised(hf: Mapping[str, Any], supported: tuple[str, ...] = ()) -> str | None:
    """The checkpoint's `quant_method`; CheckpointError unless it is None or one of `supported`."""
    known = {name: name for name in (None, *supported)}
    return choice(hf, "quantization_config.quant_method", known, None)
