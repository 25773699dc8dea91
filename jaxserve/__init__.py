"""jaxserve: a JAX-native, differentiable LLM serving stack.

Names are loaded on first use, so that a search controller imports without JAX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxserve.llm import LLM as LLM
    from jaxserve.request import RequestOutput as RequestOutput
    from jaxserve.request import SamplingParams as SamplingParams
    from jaxserve.request import StructuredOutputs as StructuredOutputs

__version__ = "0.1.0"

_HOMES = {
    "LLM": "jaxserve.llm",
    "RequestOutput": "jaxserve.request",
    "SamplingParams": "jaxserve.request",
    "StructuredOutputs": "jaxserve.request",
}
__all__ = ["LLM", "RequestOutput", "SamplingParams", "StructuredOutputs"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxserve' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
