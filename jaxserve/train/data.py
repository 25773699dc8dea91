"""Documents, packed into rows of a fixed length, from sources that can be resumed anywhere."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np


class Document(NamedTuple):
    """Tokens, and how much predicting each of them counts: 0 for a prompt, 1 for its answer."""

    tokens: Sequence[int]
    weights: Sequence[float]


class Source(Protocol):
    """An endless, numbered stream of documents: document i is the same in every run."""

    def document(self, index: int) -> Document: ...


class Batch(NamedTuple):
    """Packed rows, [B, T] each."""

    tokens: Any  # int32
    targets: Any  # int32, the token after
    weights: Any  # float32, of the target; 0 where there is none
    segments: Any  # int32, which document of the row; 0 is padding
    positions: Any  # int32, in the document

    @property
    def num_tokens(self) -> int:
        return int((self.segments > 0).sum())


def pack(source: Source, first: int, rows: int, length: int) -> tuple[Batch, int]:
    """The next batch, from document `first` on, and the first document that is not in it.

    A document goes to the first row that has room; the batch ends with the first that fits in none.
    Documents longer than a row are cut.
    """
    shape = (rows, length)
    tokens, targets, segments, positions = (np.zeros(shape, np.int32) for _ in range(4))
    batch = Batch(tokens, targets, np.zeros(shape, np.float32), segments, positions)
    used, count = [0] * rows, [0] * rows
    index = first
    while True:
        document = source.document(index)
        words, weights = document.tokens[:length], document.weights[:length]
        n = len(words)
        row = next((r for r in range(rows) if used[r] + n <= length), None)
        if row is None:
            return batch, index
        at, count[row], used[row] = used[row], count[row] + 1, used[row] + n
        batch.tokens[row, at : at + n] = words
        batch.targets[row, at : at + n - 1] = words[1:]
        batch.weights[row, at : at + n - 1] = weights[1:]
        batch.segments[row, at : at + n] = count[row]
        batch.positions[row, at : at + n] = np.arange(n)
        index += 1


@dataclass(frozen=True)
class Packed:
    """A batch, and where the stream stands after it."""

    batch: Batch
    cursor: int


def ahead(
    make: Callable[[int], Packed], cursor: int, depth: int = 2
) -> Generator[Packed, None, None]:
    """Batches from `cursor` on, made by a thread while earlier ones are trained on.

    Close the generator to end the thread. What `make` raises is raised here.
    """
    ready: queue.Queue[Packed | BaseException] = queue.Queue(depth)
    stop = threading.Event()

    def put(item: Packed | BaseException) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def run() -> None:
        at = cursor
        try:
            while not stop.is_set():
                packed = make(at)
                at = packed.cursor
                put(packed)
        except BaseException as error:  # the reader's to raise
            put(error)

    thread = threading.Thread(target=run, name="jaxserve-data", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
