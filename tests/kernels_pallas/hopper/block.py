"""What the warpgroups of a block of threads share: memories, barriers, registers and copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from tests.kernels_pallas.hopper.memory import (
    PARAMETER,
    PARAMETERS,
    Descriptor,
    FaultError,
    Findings,
    Global,
    Shared,
)
from tests.kernels_pallas.hopper.order import NOTHING, Actor, Known, joined

_REGISTERS = 1 << 16  # of a core

Schedule = Literal["late", "newest", "eager", "any"]
"""When copies happen: one once nothing else can go on, the oldest or the newest; at once, as soon
as they are asked for; or at any time."""

SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)


class Barrier:
    """An mbarrier (9.7.13.15): a phase is over when all have arrived, and all bytes have.

    Attributes:
        maker: the warpgroup that has made it.
        fenced: whether copies see that it is one.
        told: what those knew who arrived in phases that are over.
    """

    def __init__(self, arrivals: int, maker: int) -> None:
        self.maker, self.fenced = maker, False
        self._arrivals = self._awaited = arrivals
        self._bytes = self.phase = 0
        self.told = self._now = NOTHING

    def arrive(self, count: int, told: Known) -> None:
        if count > self._awaited:
            raise FaultError(f"{count} arrive at a barrier that waits for {self._awaited}")
        self._awaited -= count
        self._turn(told)

    def expect(self, count: int) -> None:
        self._bytes += count

    def bring(self, count: int, told: Known) -> None:
        self._bytes -= count
        self._turn(told)

    def passed(self, parity: int) -> bool:
        """Whether the phase of that parity is over: the one that goes on has the other parity."""
        return self.phase != parity

    def _turn(self, told: Known) -> None:
        self._now = joined(self._now, told)
        if not (self._awaited or self._bytes):
            self.told = self._now
            self.phase ^= 1
            self._awaited = self._arrivals

    def __str__(self) -> str:
        return f"phase {self.phase}, {self._awaited} arrivals and {self._bytes} bytes short"


class Pool:
    """Registers of threads (setmaxnreg, 9.7.20.5), of which each is launched with equally many."""

    def __init__(self, threads: int) -> None:
        self.each = min(_REGISTERS // threads // 8 * 8, 255)
        self.left = 0

    def change(self, held: int, wanted: int) -> bool:
        """Whether a warpgroup has them now; if not, it must wait for others to give some back."""
        if wanted - held > self.left:
            return False
        self.left -= wanted - held
        return True


@dataclass(frozen=True)
class Copy:
    """One that goes on by itself. `run` may be called again, and does nothing then."""

    what: str
    actor: Actor
    _act: Callable[[Actor], None]
    _done: list[bool] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return bool(self._done)

    def run(self) -> None:
        if not self._done:
            self._done.append(True)
            self._act(self.actor)


@dataclass
class Block:
    """A block of threads.

    Attributes:
        index: x, y and z in the grid.
        parameters: addresses of arrays; None for the one that holds descriptors.
        schedule: when copies happen.
        copies: that have been asked for, the oldest first.
        arrived: warpgroups that have come to barrier 0, ever.
        told: by those, and by how many will have come until it lets them go.
    """

    index: tuple[int, int, int]
    warpgroups: int
    memory: Global
    shared: Shared
    parameters: Sequence[int | None]
    descriptors: Sequence[Descriptor]
    pool: Pool
    findings: Findings
    schedule: Schedule
    barriers: dict[int, Barrier] = field(default_factory=dict)
    copies: list[Copy] = field(default_factory=list)
    arrived: int = 0
    told: dict[int, Known] = field(default_factory=dict)

    def begin(self, copy: Copy) -> None:
        self.copies.append(copy)
        if self.schedule == "eager":
            copy.run()

    def barrier(self, address: int) -> Barrier:
        if address not in self.barriers:
            raise FaultError(f"no mbarrier at {address:#x}: {sorted(self.barriers)}")
        return self.barriers[address]

    def descriptor(self, address: int) -> Descriptor:
        """By the address of a parameter, in which one lies each 128 bytes."""
        number, offset = divmod(address - PARAMETERS, PARAMETER)
        there = 0 <= number < len(self.parameters) and self.parameters[number] is None
        if not there or offset % 128 or offset // 128 >= len(self.descriptors):
            raise FaultError(f"no descriptor at {address:#x}")
        return self.descriptors[offset // 128]
