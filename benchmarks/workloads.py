"""The requests that every contestant gets: token ids and exact output lengths, from a seed.

Each round draws fresh ids, so a prefix cache helps only where a workload shares a prefix on
purpose. Lengths are the same in every round.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

FIRST_ID = 16
"""Ids below are left to special tokens."""

MAX_LEN = 2048
"""Context length that holds every workload; contestants are set to it."""

Ids = list[int]
Lengths = list[int]


@dataclass(frozen=True)
class Workload:
    """Requests submitted at once.

    Attributes:
        counts: which tokens the rate counts; `first` reports the time to the first token instead.
    """

    name: str
    prompts: list[Ids]
    lengths: Lengths
    counts: Literal["output", "prompt", "first"]

    @property
    def unit(self) -> str:
        return "s" if self.counts == "first" else "tok/s"

    def score(self, seconds: float) -> float:
        """Tokens per second, or the seconds themselves: `unit` says which."""
        if self.counts == "first":
            return seconds
        prompt = sum(map(len, self.prompts))
        return (prompt if self.counts == "prompt" else sum(self.lengths)) / seconds


Draw = Callable[[int], Ids]


def _uniform(count: int, prompt: int, output: int) -> Callable[[Draw], tuple[list[Ids], Lengths]]:
    return lambda draw: ([draw(prompt) for _ in range(count)], [output] * count)


def _mixed(draw: Draw) -> tuple[list[Ids], Lengths]:
    """64 requests: prompts of 16 to 512 tokens, outputs of 16 to 256, both uniform."""
    lengths = np.random.default_rng(64)
    prompts = [draw(int(n)) for n in lengths.integers(16, 513, 64)]
    return prompts, lengths.integers(16, 257, 64).tolist()


def _shared_prefix(draw: Draw) -> tuple[list[Ids], Lengths]:
    """32 requests: one prefix of 512 tokens, then 32 tokens each of their own; 32 tokens out."""
    prefix = draw(512)
    return [prefix + draw(32) for _ in range(32)], [32] * 32


_WORKLOADS = {
    "single_decode": (_uniform(1, 32, 128), "output"),
    "batch16_decode": (_uniform(16, 32, 128), "output"),
    "prefill_1x1024": (_uniform(1, 1024, 1), "prompt"),
    "prefill_8x256": (_uniform(8, 256, 1), "prompt"),
    "mixed_64": (_mixed, "output"),
    "prefix_32": (_shared_prefix, "output"),
    "ttft_32": (_uniform(1, 32, 1), "first"),
}
NAMES = tuple(_WORKLOADS)


def build(name: str, vocab_size: int, round: int = 0) -> Workload:
    """The requests of one round."""
    make, counts = _WORKLOADS[name]
    rng = np.random.default_rng([zlib.crc32(name.encode()), round])
    prompts, lengths = make(lambda n: rng.integers(FIRST_ID, vocab_size, n).tolist())
    return Workload(name, prompts, lengths, counts)


def vocab_size(model: str | Path) -> int:
    return json.loads((Path(model) / "config.json").read_text())["vocab_size"]
