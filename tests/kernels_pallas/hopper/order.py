"""What is known to have happened before what, and accesses to shared memory that nothing orders.

Warpgroups and copies are actors. What one does is counted in stretches, which end wherever it tells
others of them: as it arrives at a barrier, or asks for a copy. Everybody knows of each actor how
many stretches of it are over (vector clocks; Mattern, 1988), and learns what others knew as they
told it. Of two accesses to a byte, one of which writes, the later actor must know the earlier one's
stretch to be over, whatever order they were executed in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Known = NDArray[np.int32]
"""Of each actor, by its number, the last stretch that is over. Those behind its end are unknown."""

NOTHING: Known = np.zeros(0, np.int32)


def joined(a: Known, b: Known) -> Known:
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    found = longer.copy()
    np.maximum(found[: len(shorter)], shorter, out=found[: len(shorter)])
    return found


@dataclass
class Actor:
    """A warpgroup or a copy.

    Attributes:
        known: to it; of itself, the stretch that goes on.
    """

    number: int
    known: Known

    @property
    def now(self) -> int:
        return int(self.known[self.number])

    def tell(self) -> Known:
        """What it knows, itself included, to whoever is told; what it does next is not in it."""
        told = self.known.copy()
        self.known[self.number] += 1
        return told

    def learn(self, told: Known) -> None:
        self.known = joined(self.known, told)


class Order:
    """The actors of a block of threads, and who has used each byte of its shared memory last.

    Attributes:
        versions: of bytes: the number of the write that they are from.
    """

    def __init__(self, size: int, warpgroups: int) -> None:
        self._actors = self._writes = 0
        self.warpgroups = [self.actor() for _ in range(warpgroups)]
        self._writer, self._written = (np.zeros(size, np.int32) for _ in range(2))
        self._reads = np.zeros((warpgroups, size), np.int32)
        self.versions = np.zeros(size, np.int64)
        self._copied = np.zeros(size, np.int32)  # the last copy that reads; 0, a warpgroup, if none

    def actor(self, told: Known = NOTHING) -> Actor:
        """Another actor, which begins with what it was told."""
        number = self._actors
        self._actors += 1
        known = np.zeros(number + 1, np.int32)
        known[: len(told)] = told
        known[number] = 1
        return Actor(number, known)

    def reads(self, at: NDArray[Any], actor: Actor) -> bool:
        """Whether bytes may be read: who wrote them is known to have done so."""
        known = self._padded(actor)
        if actor.number < len(self.warpgroups):
            self._reads[actor.number, at] = actor.now
        else:
            self._copied[at] = actor.number
        return bool((self._written[at] <= known[self._writer[at]]).all())

    def writes(self, at: NDArray[Any], actor: Actor) -> bool:
        """Whether bytes may be written: who wrote or read them is known to have done so."""
        known = self._padded(actor)
        copied = self._copied[at]
        fine = (self._written[at] <= known[self._writer[at]]).all()
        fine &= ((known[copied] > 0) | (copied == 0)).all()
        for number in range(len(self.warpgroups)):
            fine &= (self._reads[number, at] <= known[number]).all()
        self._writer[at], self._written[at] = actor.number, actor.now
        self._writes += 1
        self.versions[at] = self._writes
        return bool(fine)

    def _padded(self, actor: Actor) -> Known:
        return np.pad(actor.known, (0, self._actors - len(actor.known)))
