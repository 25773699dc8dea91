"""Documents out of text: lines of files, and pairs that somebody else makes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from jaxserve.errors import ConfigError
from jaxserve.train.data import Document

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Pairs:
    """Prompts with their completions, tokenised as they come.

    Attributes:
        pair: (prompt, completion) of a number; the same pair each time. An empty prompt makes the
            whole text count.
        encode: a text's tokens, with what begins it.
        end: the token that ends a completion.
    """

    pair: Callable[[int], tuple[str, str]]
    encode: Encode
    end: int

    def document(self, index: int) -> Document:
        prompt, completion = self.pair(index)
        text = f"{prompt} {completion}" if prompt else completion
        given = len(self.encode(prompt)) if prompt else 0
        tokens = [*self.encode(text), self.end]
        return Document(tokens, [0.0] * given + [1.0] * (len(tokens) - given))


@dataclass(frozen=True)
class Lines:
    """JSON lines of {"prompt", "completion"} or {"text"}, in another order in each epoch."""

    files: tuple[Path, ...]
    seed: int
    encode: Encode
    end: int

    @cached_property
    def _pairs(self) -> list[tuple[str, str]]:
        pairs = [pair for file in self.files for pair in _read(file)]
        if not pairs:
            raise ConfigError(f"{', '.join(map(str, self.files))}: no lines to train on")
        return pairs

    def document(self, index: int) -> Document:
        epoch, at = divmod(index, len(self._pairs))
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self._pairs))
        return Pairs(lambda i: self._pairs[order[i]], self.encode, self.end).document(at)


def _read(file: Path) -> list[tuple[str, str]]:
    """The pairs of a file.

    Raises:
        ConfigError: it cannot be read, or a line is not what it should be, such as the last one of
            a file that was cut off.
    """
    try:
        lines = file.read_text("utf-8").split("\n")  # others are a string's own
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from None
    return [_pair(line, f"{file}:{i + 1}") for i, line in enumerate(lines) if line.strip()]


def _pair(line: str, where: str) -> tuple[str, str]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where} is not JSON ({error}); is the file truncated?") from None
    if isinstance(entry, dict) and "text" in entry:
        entry = {"prompt": "", "completion": entry["text"]}
    match entry:
        case {"prompt": str(prompt), "completion": str(completion)}:
            return prompt, completion
    raise ConfigError(f'{where} must have "text", or "prompt" and "completion", as strings')
