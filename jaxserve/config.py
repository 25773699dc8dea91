"""What was asked of an engine; `plan.py` decides the rest. Every field has a default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from jaxserve.errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class EngineConfig:
    """Settings in vLLM's names; None lets the plan choose.

    Attributes:
        dtype: of weights and cache; "auto" is the checkpoint's own, where the device is good at it.
        max_model_len: longest prompt and output together.
        max_num_seqs: most sequences in one step.
        max_num_batched_tokens: most tokens in one step.
        page_size: tokens per page of the cache.
        num_pages: of the cache; overrides `memory_utilization`.
        memory_utilization: share of the device's memory for weights and cache.
        seed: of requests that bring none.
        enable_prefix_caching: reuse pages of equal prompt beginnings.
        decode_steps: tokens decoded per launch when every row decodes and none needs the host.
        kernels: "native" (C++ on CPU), "reference" (plain XLA), or "auto".
        load_format: "dummy" fills weights with random numbers instead of reading them.
        background_compile: serve with the first program while the others are compiled.
        forbid_compile: after warm-up, any compilation is an error.
        progress: show bars and the plan on the terminal.
    """

    dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    page_size: int | None = None
    num_pages: int | None = None
    memory_utilization: float = 0.9
    seed: int = 0
    enable_prefix_caching: bool = True
    decode_steps: int = 1
    kernels: Literal["auto", "native", "reference"] = "auto"
    load_format: Literal["auto", "dummy"] = "auto"
    background_compile: bool = True
    forbid_compile: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        page_ok = self.page_size is None or (
            self.page_size >= 8 and self.page_size & (self.page_size - 1) == 0
        )
        checks: list[tuple[str, bool, str]] = [
            ("dtype", self.dtype in DTYPES, f"one of {', '.join(DTYPES)}"),
            ("memory_utilization", 0 < self.memory_utilization <= 1, "in (0, 1]"),
            ("page_size", page_ok, "a power of two, at least 8"),
            ("decode_steps", 1 <= self.decode_steps <= 64, "between 1 and 64"),
            (
                "kernels",
                self.kernels in ("auto", "native", "reference"),
                "auto, native or reference",
            ),
            ("load_format", self.load_format in ("auto", "dummy"), "auto or dummy"),
        ]
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "num_pages"):
            value: Any = getattr(self, name)
            checks.append((name, value is None or value >= 1, "at least 1"))
        for name, ok, expected in checks:
            if not ok:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be {expected}")
