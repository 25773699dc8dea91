"""A warpgroup: 128 lanes in lockstep, and what they hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.kernels_pallas.hopper.arithmetic import LANES, TYPES, Lanes
from tests.kernels_pallas.hopper.block import Block, Copy
from tests.kernels_pallas.hopper.memory import (
    PARAMETER,
    PARAMETERS,
    SHARED,
    Addresses,
    FaultError,
)
from tests.kernels_pallas.hopper.ptx import (
    Address,
    Immediate,
    Operand,
    Program,
    Register,
    Symbol,
)

Waits = str | None
"""What a warpgroup waits for, if it cannot go on; it comes back to the same instruction then."""

Step = Callable[["Warpgroup"], Waits]

_TOGETHER = {"bar", "cp", "elect", "fence", "ldmatrix", "mbarrier", "ret", "setmaxnreg", "shfl"}
_TOGETHER |= {"stmatrix", "wgmma"}
"""What whole warps execute, whole warpgroups, or one lane for all of them."""

ALL = np.ones(LANES, bool)
U16, U32, U64 = (np.dtype(f"u{n}") for n in (2, 4, 8))


@dataclass
class Products:
    """A wgmma that goes on: what must stay as it is until it was waited for.

    Attributes:
        read: bytes of shared memory, and which versions of them.
    """

    registers: frozenset[str]
    read: list[tuple[Addresses, NDArray[np.int64]]]


class Warpgroup:
    """One of a block of threads.

    Attributes:
        at: the instruction that is next.
        mask: lanes that execute it.
        here: lanes at this instruction.
        ahead: the others, by theirs. Those that are behind go first, so all meet again.
        unfenced: registers that were touched since the last wgmma.fence, but by products.
        waits: what for, since it cannot go on.
    """

    def __init__(self, block: Block, number: int, program: Program, steps: list[Step]) -> None:
        self.block, self.number = block, number
        self.actor = block.shared.order.warpgroups[number]
        self._program, self._steps = program, steps
        self.at, self.done, self.waits = 0, False, ""
        self.mask = self.here = ALL
        self.ahead = dict[int, Lanes]()
        self.registers = dict[str, Lanes]()
        self.held = block.pool.each
        self.awaited: int | None = None  # of barrier 0: how many must have arrived
        self.going = list[Products]()  # since the last commit
        self.committed = list[list[Products]]()
        self.in_flight = set[str]()  # registers of both
        self.unfenced = set[str]()
        self.stores = list[Copy]()  # since the last commit
        self.stored = list[list[Copy]]()
        self.registers["%tid.x"] = (number * LANES + np.arange(LANES)).astype(U32)
        for name in ("%tid.y", "%tid.z"):
            self.registers[name] = np.zeros(LANES, U32)
        for axis, index in zip("xyz", block.index, strict=True):
            self.registers[f"%ctaid.{axis}"] = np.full(LANES, index, U32)

    def run(self, most: int) -> bool:
        """Executes up to so many instructions, until it must wait; whether it did any."""
        for count in range(most):
            if self.done:
                return count > 0
            self.waits = self._step() or ""
            if self.waits:
                return count > 0
        return True

    def _step(self) -> Waits:
        if self.ahead:
            self._meet()
        here, instruction = self.at, self._program.instructions[self.at]
        if self.ahead and instruction.parts[0] in _TOGETHER:
            raise FaultError(f"lanes of a warpgroup part, and {instruction.text!r} takes all")
        guard = instruction.guard
        self.mask = self.here if guard is None else self.here & self.predicate(guard)
        self.at += 1
        waits = self._steps[here](self)
        self.at = here if waits else self.at
        return waits

    def branch(self, at: int) -> None:
        target = self._program.targets[at]
        if (self.mask == self.here).all():
            self.at = target
        elif self.mask.any():
            self._wait_at(target, self.mask)
            self.here = self.here & ~self.mask

    def _meet(self) -> None:
        """Lanes that are furthest behind go on, with those that have come as far."""
        first = min(self.ahead)
        if first < self.at:
            self._wait_at(self.at, self.here)
            self.at, self.here = first, self.ahead.pop(first)
        elif first == self.at:
            self.here = self.here | self.ahead.pop(first)

    def _wait_at(self, instruction: int, lanes: Lanes) -> None:
        self.ahead[instruction] = self.ahead.get(instruction, ~ALL) | lanes

    def predicate(self, operand: Operand) -> Lanes:
        return self.read(operand, TYPES["pred"])

    def read(self, operand: Operand, dtype: np.dtype[Any]) -> Lanes:
        """An operand, which may be wider than the type it is taken for."""
        if isinstance(operand, Register):
            found = self._register(operand.name)
            if found.dtype.itemsize > dtype.itemsize:
                found = found.astype(f"u{dtype.itemsize}")
            if found.dtype.itemsize < dtype.itemsize:
                raise FaultError(f"{operand.name} holds {found.dtype}, and is taken for {dtype}")
            found = found if found.dtype == dtype else found.view(dtype)
            return ~found if operand.negated else found
        if isinstance(operand, Immediate):
            return _constant(operand.value, dtype)
        if isinstance(operand, Symbol):
            return _constant(_place(operand.name), dtype)
        raise FaultError(f"{operand} is not a value")

    def _register(self, name: str) -> Lanes:
        self._touched(name)
        if name not in self.registers:
            self.block.findings[f"{name} is read, which nothing has written"] += 1
            self.registers[name] = np.zeros(LANES, _width(name))
        return self.registers[name]

    def write(self, operand: Operand, values: Lanes) -> None:
        """Lanes that the mask leaves out keep what they had. Integers are extended to the register,
        as ld and cvt do."""
        assert isinstance(operand, Register)
        if operand.name == "_":
            return
        self._touched(operand.name)
        if values.dtype.kind in "iu" and values.dtype.itemsize < (
            n := _width(operand.name).itemsize
        ):
            values = values.astype(f"{values.dtype.kind}{n}")
        if values.dtype.kind not in "ub":
            values = np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")
        if self.mask is not ALL and not self.mask.all():
            before = self.registers.get(operand.name, np.zeros_like(values))
            values = np.where(self.mask, values, before)
        self.registers[operand.name] = values

    def _touched(self, name: str) -> None:
        self.unfenced.add(name)
        if name in self.in_flight:
            text = "registers of a wgmma are touched before it was waited for"
            self.block.findings[text] += 1

    def address(self, operand: Operand) -> Addresses:
        """Of each lane that executes."""
        assert isinstance(operand, Address), operand
        base = operand.base
        dtype = (
            U32 if isinstance(base, Register) and self._register(base.name).dtype == U32 else U64
        )
        return (self.read(base, dtype)[self.mask].astype(np.int64)) + operand.offset

    def only(self, found: Addresses) -> int:
        """What all lanes that execute have in common."""
        if not len(found) or (found != found[0]).any():
            raise FaultError("lanes name several places where one is expected")
        return int(found[0])


def _place(symbol: str) -> int:
    name, _, offset = symbol.partition("+")
    if name.startswith("__dynamic_shmem__"):
        return SHARED + int(offset or 0)
    return PARAMETERS + PARAMETER * parameter(name)


def parameter(name: str) -> int:
    """The number of a parameter, by its name."""
    _, found, number = name.rpartition("_param_")
    if not found:
        raise FaultError(f"{name} is neither shared memory nor a parameter")
    return int(number)


@cache
def _constant(value: int, dtype: np.dtype[Any]) -> Lanes:
    if dtype.kind == "b":
        return np.full(LANES, bool(value))
    bits = value & ((1 << 8 * dtype.itemsize) - 1)
    return np.full(LANES, bits, f"u{dtype.itemsize}").view(dtype)


@cache
def _width(name: str) -> np.dtype[Any]:
    """Of a register, by its name."""
    kinds = {"p": np.dtype(bool), "rs": U16, "r": U32, "rd": U64}
    return kinds.get(name.strip("%0123456789"), U32)
