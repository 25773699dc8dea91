"""Runs a grid: blocks of threads one after the other, their warpgroups in a shuffled order, and
copies when a schedule says so."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from tests.kernels_pallas.hopper.arithmetic import LANES
from tests.kernels_pallas.hopper.block import SCHEDULES, Block, Pool, Schedule
from tests.kernels_pallas.hopper.instructions import steps
from tests.kernels_pallas.hopper.memory import Descriptor, FaultError, Findings, Global, Shared
from tests.kernels_pallas.hopper.ptx import Program
from tests.kernels_pallas.hopper.warpgroup import Step, Warpgroup

_TURN = 400  # instructions of a warpgroup, before another one may go on


@dataclass(frozen=True)
class Grid:
    """What a kernel is launched with.

    Attributes:
        shared: bytes of shared memory.
        parameters: numbers of arrays; None for the one that holds descriptors.
    """

    blocks: tuple[int, int, int]
    threads: int
    shared: int
    parameters: tuple[int | None, ...]


def run(
    program: Program, grid: Grid, memory: Global, descriptors: Sequence[Descriptor], *,
    seed: int, schedule: Schedule | None,
) -> Findings:  # fmt: skip
    """Executes a kernel on memory, which it changes; what was wrong.

    Args:
        schedule: when copies happen; if None, every block has one of its own.

    Raises:
        UnknownInstructionError: before anything is executed.
    """
    findings, decoded = Findings(), steps(program)
    pointers = [None if x is None else memory.address(x) for x in grid.parameters]
    x, y, z = grid.blocks
    for number, index in enumerate(itertools.product(range(z), range(y), range(x))):
        order = random.Random(seed + number)
        warpgroups = grid.threads // LANES
        shared = Shared(grid.shared, seed + number, findings, warpgroups)
        block = Block(
            index[::-1], warpgroups, memory, shared, pointers, descriptors,
            Pool(grid.threads), findings, schedule or order.choice(SCHEDULES),
        )  # fmt: skip
        try:
            _run_block(block, program, decoded, order)
        except FaultError as error:
            findings[f"block {index[::-1]} stopped: {error}"] += 1
    return findings


def _run_block(block: Block, program: Program, decoded: list[Step], order: random.Random) -> None:
    warpgroups = [Warpgroup(block, i, program, decoded) for i in range(block.warpgroups)]
    while going := [x for x in warpgroups if not x.done]:
        progress = False
        turns = [*going, *(block.copies if block.schedule == "any" else [])]
        order.shuffle(turns)
        for turn in turns:
            if isinstance(turn, Warpgroup):
                progress |= turn.run(_TURN)
            elif not turn.done:
                turn.run()
                progress = True
        block.copies = [copy for copy in block.copies if not copy.done]
        if not progress and block.copies:
            block.copies.pop(-1 if block.schedule == "newest" else 0).run()
        elif not progress:
            waits = "; ".join(f"warpgroup {x.number} for {x.waits}" for x in going)
            raise FaultError(f"deadlock, {waits}")
    for copy in block.copies:
        block.findings[f"a block ends before {copy.what!r} does"] += 1
        copy.run()
