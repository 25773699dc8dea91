"""What each instruction does that is no arithmetic: memory, copies, products, waiting, branches."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.kernels_pallas.hopper import matrix
from tests.kernels_pallas.hopper.arithmetic import LANES, TYPES, WARP, Lanes, Operation, operation
from tests.kernels_pallas.hopper.block import Barrier, Block, Copy
from tests.kernels_pallas.hopper.memory import Addresses, FaultError, lined_up
from tests.kernels_pallas.hopper.order import NOTHING, Actor, joined
from tests.kernels_pallas.hopper.ptx import (
    Address,
    Immediate,
    Instruction,
    Operand,
    Program,
    Register,
    Symbol,
    Vector,
)
from tests.kernels_pallas.hopper.warpgroup import (
    ALL,
    U16,
    U32,
    U64,
    Products,
    Step,
    Waits,
    Warpgroup,
    parameter,
)


def steps(program: Program) -> list[Step]:
    """What each instruction does.

    Raises:
        UnknownInstructionError: an instruction is not known.
    """
    return [_decoded(i, instruction) for i, instruction in enumerate(program.instructions)]


def _decoded(number: int, instruction: Instruction) -> Step:
    if instruction.parts[0] == "bra":
        return lambda warpgroup: warpgroup.branch(number)
    for length in range(min(4, len(instruction.parts)), 0, -1):
        if step := _TABLE.get(".".join(instruction.parts[:length])):
            return partial(step, x=instruction)
    if instruction.opcode in ("mov.b32", "mov.b64") and Vector in map(type, instruction.operands):
        return partial(_repack, x=instruction)
    return partial(_compute, x=instruction, does=operation(instruction))


def _compute(w: Warpgroup, x: Instruction, does: Operation) -> None:
    target, *sources = x.operands
    values = [w.read(source, t) for source, t in zip(sources, does.sources, strict=True)]
    with np.errstate(all="ignore"):
        w.write(target, does.function(*values))


def _repack(w: Warpgroup, x: Instruction) -> None:
    """mov of one register to two of half its size, or back. LLVM fills registers up with halves
    that nothing has written, and drops them later: their bits are set here, as those of a NaN."""
    whole, half = (U32, U16) if x.parts[-1] == "b32" else (U64, U32)
    target, source = x.operands
    if isinstance(target, Vector):
        halves = w.read(source, whole).copy().view(half).reshape(LANES, 2)
        for register, values in zip(target.items, halves.T, strict=True):
            w.write(register, values.copy())
    elif isinstance(source, Vector):
        nothing = np.full(LANES, -1).astype(half)
        unwritten = [isinstance(x, Register) and x.name not in w.registers for x in source.items]
        halves = [
            nothing if left_out else w.read(register, half)
            for register, left_out in zip(source.items, unwritten, strict=True)
        ]
        w.write(target, np.stack(halves, 1).view(whole)[:, 0])


def _elect(w: Warpgroup, x: Instruction) -> None:
    """One lane of each warp, and it is the first (9.7.9.8)."""
    [pair, _] = x.operands
    assert isinstance(pair, Vector)
    lane, predicate = pair.items
    w.write(lane, np.zeros(LANES, U32))
    w.write(predicate, np.arange(LANES) % WARP == 0)


def _return(w: Warpgroup, x: Instruction) -> None:
    w.done = True
    if w.stores or any(w.stored):
        w.block.findings["a warpgroup ends before its copies were waited for"] += 1


def _nothing(w: Warpgroup, x: Instruction) -> None:
    """What only takes time."""


def _barrier(w: Warpgroup, x: Instruction) -> Waits:
    """bar.sync: of the whole block, or of one warpgroup, whose lanes are in lockstep anyway."""
    number, *threads = (int(w.read(operand, U32)[0]) for operand in x.operands)
    if threads == [LANES]:
        return None
    if number or threads:
        raise FaultError(f"{x.text!r}: of one warpgroup, or barrier 0 of all, is expected")
    block = w.block
    if w.awaited is None:
        w.awaited = (block.arrived // block.warpgroups + 1) * block.warpgroups
        block.arrived += 1
        block.told[w.awaited] = joined(block.told.get(w.awaited, NOTHING), w.actor.tell())
    if block.arrived < w.awaited:
        return "barrier 0"
    w.actor.learn(block.told[w.awaited])
    w.awaited = None
    return None


def _init_barrier(w: Warpgroup, x: Instruction) -> None:
    address, arrivals = x.operands
    counts = w.read(arrivals, U32)[w.mask]
    for at, count in zip(w.address(address), counts, strict=True):
        lined_up(np.array([at]), 8, "an mbarrier")
        w.block.barriers[int(at)] = Barrier(int(count), w.number)


def _fence_barriers(w: Warpgroup, x: Instruction) -> None:
    """fence.mbarrier_init (9.7.13.4): copies see the barriers that this warpgroup has made."""
    for barrier in w.block.barriers.values():
        barrier.fenced |= barrier.maker == w.number


def _arrive(w: Warpgroup, x: Instruction) -> None:
    """mbarrier.arrive, perhaps with bytes to expect; each lane that executes arrives."""
    _, address, *count = x.operands
    if not w.mask.any():
        return
    barrier = w.block.barrier(w.only(w.address(address)))
    counts = w.read(count[0] if count else Immediate(1), U32)[w.mask].astype(int)
    if "expect_tx" in x.parts:
        barrier.expect(int(counts.sum()))
        barrier.arrive(len(counts), w.actor.tell())
    else:
        barrier.arrive(int(counts.sum()), w.actor.tell())


def _try_wait(w: Warpgroup, x: Instruction) -> Waits:
    """Suspends until the phase is over, however long, and so it always is."""
    target, address, parity, *_ = x.operands
    at = w.only(w.address(address))
    barrier, wanted = w.block.barrier(at), int(w.read(parity, U32)[0])
    if not barrier.passed(wanted):
        return f"parity {wanted} of the barrier at {at:#x}, which is in {barrier}"
    w.actor.learn(barrier.told)
    w.write(target, ALL.copy())
    return None


def _registers(w: Warpgroup, x: Instruction) -> Waits:
    wanted = int(w.read(x.operands[0], U32)[0])
    more = x.parts[1] == "inc"
    if wanted % 8 or not 24 <= wanted <= 256 or (wanted < w.held if more else wanted > w.held):
        raise FaultError(f"{x.text!r} of a warpgroup that has {w.held} registers")
    if not w.block.pool.change(w.held, wanted):
        return f"{wanted} registers, where it has {w.held} and {w.block.pool.left} are left"
    w.held = wanted
    return None


def _load(w: Warpgroup, x: Instruction) -> None:
    target, source = x.operands
    if x.parts[1].startswith("param"):
        assert isinstance(source, Address)
        assert isinstance(source.base, Symbol)
        pointer = w.block.parameters[parameter(source.base.name)]
        if pointer is None:
            raise FaultError(f"{x.text!r} reads what the host is not known to pass")
        return w.write(target, np.full(LANES, pointer, U64))
    if not w.mask.any():
        return None
    registers = target.items if isinstance(target, Vector) else (target,)
    dtype = TYPES[x.parts[-1]]
    at, size = w.address(source), dtype.itemsize * len(registers)
    raw = np.zeros((LANES, size), np.uint8)
    if x.parts[1].startswith("shared"):
        raw[w.mask] = w.block.shared.load(at, size, w.actor, "ld")
    else:
        lined_up(at, size, "ld")
        raw[w.mask] = w.block.memory.load(at, size)
    for register, values in zip(registers, raw.view(dtype).T, strict=True):
        w.write(register, values.copy())
    return None


def _store(w: Warpgroup, x: Instruction) -> None:
    target, source = x.operands
    registers = source.items if isinstance(source, Vector) else (source,)
    dtype = TYPES[x.parts[-1]]
    raw = np.stack([w.read(register, dtype) for register in registers], 1).view(np.uint8)[w.mask]
    at = w.address(target)
    if x.parts[1].startswith("shared"):
        w.block.shared.store(at, raw, w.actor, "st")
    else:
        lined_up(at, raw.shape[1], "st")
        w.block.memory.store(at, raw)


def _tiles(w: Warpgroup, x: Instruction) -> None:
    """ldmatrix and stmatrix (9.7.14.5.15): 8 x 8 of 16 bits; lane 8 i + j names row j of the i-th
    of a warp, and lane 4 j + k holds two elements of row j."""
    load = x.parts[0] == "ldmatrix"
    registers, memory = x.operands if load else x.operands[::-1]
    registers = registers.items if isinstance(registers, Vector) else (registers,)
    count = len(registers)
    if f"x{count}" not in x.parts or "m8n8" not in x.parts:
        raise x.unknown()
    at = w.address(memory).reshape(-1, WARP)[:, : 8 * count].reshape(-1)  # [warp, matrix, row]
    shape = (LANES // WARP, count, 8, 8)
    if load:
        tiles = w.block.shared.load(at, 16, w.actor, "ldmatrix").view(U16).reshape(shape)
        tiles = tiles.swapaxes(2, 3) if "trans" in x.parts else tiles
        words = np.ascontiguousarray(tiles).view(U32).reshape(LANES // WARP, count, WARP)
        for register, values in zip(registers, words.swapaxes(0, 1), strict=True):
            w.write(register, values.reshape(LANES))
        return
    words = np.stack([w.read(register, U32).reshape(-1, WARP) for register in registers], 1)
    tiles = np.ascontiguousarray(words).view(U16).reshape(shape)
    tiles = tiles.swapaxes(2, 3) if "trans" in x.parts else tiles
    rows = np.ascontiguousarray(tiles).reshape(-1, 8).view(np.uint8)
    w.block.shared.store(at, rows, w.actor, "stmatrix")


def _copy_box(w: Warpgroup, x: Instruction) -> None:
    """cp.async.bulk.tensor (9.7.9.27.1.2), to shared memory or from it."""
    load = x.parts[5].startswith("shared")
    tensor, here = x.operands[1 if load else 0], x.operands[0 if load else 1]
    assert isinstance(tensor, Address)
    for lane in _lanes(w):
        descriptor = w.block.descriptor(int(w.read(tensor.base, U64)[lane]))
        first = [int(w.read(c, TYPES["s32"])[lane]) for c in reversed(tensor.coordinates)]
        box = descriptor.boxed(first, int(w.address(here)[0]))
        act = box.load if load else box.store
        act = partial(act, w.block.memory, w.block.shared, descriptor.item)
        if load:
            barrier = w.block.barrier(int(w.address(x.operands[2])[0]))
            if not barrier.fenced:
                w.block.findings["a copy goes to a barrier without a fence.mbarrier_init"] += 1
            act = partial(_brought, act, barrier, descriptor.bytes)
        _go(w, x, act, stores=not load)


def _brought(act: Callable[[Actor], None], barrier: Barrier, count: int, actor: Actor) -> None:
    act(actor)
    barrier.bring(count, actor.known)


def _copy_bytes(w: Warpgroup, x: Instruction) -> None:
    """cp.async.bulk from shared memory to neighbouring bytes of global memory (9.7.9.25.4.1)."""
    if "global" not in x.parts[3]:
        raise x.unknown()
    for _ in _lanes(w):
        there, here = (w.address(operand) for operand in x.operands[:2])
        count = int(w.read(x.operands[2], U32)[w.mask][0])
        for each in (there, here, np.array([count])):
            lined_up(each, 16, "cp.async.bulk")
        _go(w, x, partial(_moved, w.block, there, here, count), stores=True)


def _moved(block: Block, there: Addresses, here: Addresses, count: int, actor: Actor) -> None:
    block.memory.store(there, block.shared.read_async(here, count, actor, "cp.async.bulk"))


def _lanes(w: Warpgroup) -> Iterator[int]:
    """Lanes that execute, one after the other, each with a mask of its own."""
    whole = w.mask
    for lane in np.nonzero(whole)[0]:
        w.mask = np.arange(LANES) == lane
        yield int(lane)
    w.mask = whole


def _go(w: Warpgroup, x: Instruction, act: Callable[[Actor], None], *, stores: bool) -> None:
    copy = Copy(x.text, w.block.shared.order.actor(w.actor.tell()), act)
    w.block.begin(copy)
    if stores:
        w.stores.append(copy)


def _commit_copies(w: Warpgroup, x: Instruction) -> None:
    w.stored.append(w.stores)
    w.stores = []


def _wait_copies(w: Warpgroup, x: Instruction) -> None:
    """All but the latest groups; what was waited for is over."""
    left = int(w.read(x.operands[0], U32)[0])
    for group in w.stored[: len(w.stored) - left]:
        for copy in group:
            copy.run()
            w.actor.learn(copy.actor.known)
    w.stored = w.stored[len(w.stored) - left :] if left else []


def _fence_proxy(w: Warpgroup, x: Instruction) -> None:
    if x.parts[2] != "async":
        raise x.unknown()
    w.block.shared.fence(w.number)


def _multiply(w: Warpgroup, x: Instruction) -> None:
    """wgmma.mma_async (9.7.15.5.2): sums += A B^T, from shared memory or A from registers."""
    columns, kind, transposed = _product(w, x)
    sums, a, b, keep, *_ = x.operands
    assert isinstance(sums, Vector)
    registers = (*sums.items, *(a.items if isinstance(a, Vector) else ()))
    names = frozenset(each.name for each in registers if isinstance(each, Register))
    if names & w.unfenced:
        w.block.findings["a wgmma takes registers that were touched since a wgmma.fence"] += 1
    read = list[tuple[Addresses, NDArray[np.int64]]]()
    if isinstance(a, Vector):
        rows = matrix.unpacked(np.stack([w.read(register, U32) for register in a.items]))
    else:
        rows = _matrix(w, a, matrix.ROWS, kind, transposed[0], read)
    right = _matrix(w, b, columns, kind, transposed[-1], read)
    with np.errstate(all="ignore"):
        product = rows @ right.T
    row, column = matrix.places(columns)
    kept = w.predicate(keep)
    for register, values in zip(sums.items, product[row, column].astype(kind.sums), strict=True):
        assert isinstance(register, Register)
        before = _sums(w, register.name, kind.sums)
        with np.errstate(all="ignore"):
            w.registers[register.name] = np.where(kept, before + values, values).view(U32)
    w.going.append(Products(names, read))
    w.in_flight |= names
    w.unfenced -= names


def _product(w: Warpgroup, x: Instruction) -> tuple[int, matrix.Kind, list[bool]]:
    """Columns and types of a product, and whether A and B are transposed, or only B."""
    kind, signs, transposed = matrix.KINDS.get(x.parts[5:]), x.operands[4:6], x.operands[6:]
    found = re.fullmatch(r"m64n(\d+)k(\d+)", x.parts[4])
    if kind is None or found is None or int(found[2]) != kind.depth:
        raise x.unknown()
    if kind.sums == np.int32:
        if signs or isinstance(x.operands[1], Vector):
            raise x.unknown()
        return int(found[1]), kind, [False]
    if set(signs) != {Immediate(1)}:
        raise x.unknown()
    return int(found[1]), kind, [bool(int(w.read(each, U32)[0])) for each in transposed]


def _sums(w: Warpgroup, name: str, dtype: np.dtype[Any]) -> Lanes:
    """Products that go on may add to the same sums, of the same shape, in their order."""
    return w.registers[name].view(dtype) if name in w.registers else w.read(Register(name), dtype)


def _matrix(
    w: Warpgroup, operand: Operand, rows: int, kind: matrix.Kind, transposed: bool,
    read: list[tuple[Addresses, NDArray[np.int64]]],
) -> Lanes:  # fmt: skip
    descriptor = w.only(w.read(operand, U64).view(np.int64))
    at, size = matrix.operand(descriptor, rows, kind, transposed=transposed), kind.item.itemsize
    raw = w.block.shared.read_async(at, size, w.actor, "wgmma")
    index = at[..., None] + np.arange(size)
    read.append((index, w.block.shared.order.versions[index]))
    return kind.matrix(raw)


def _fence_products(w: Warpgroup, x: Instruction) -> None:
    """wgmma.fence (9.7.15.7.1): products see what registers hold."""
    w.unfenced = set()


def _commit_products(w: Warpgroup, x: Instruction) -> None:
    w.committed.append(w.going)
    w.going = []


def _wait_products(w: Warpgroup, x: Instruction) -> None:
    left = int(w.read(x.operands[0], U32)[0])
    over = w.committed[: len(w.committed) - left]
    w.committed = w.committed[len(over) :]
    going = (products for group in (w.going, *w.committed) for products in group)
    w.in_flight = set[str]().union(*(products.registers for products in going))
    for products in (products for group in over for products in group):
        for at, _ in products.read:
            w.block.shared.read_until_now(at, w.actor, "wgmma")
        versions = w.block.shared.order.versions
        if any((versions[at] != version).any() for at, version in products.read):
            w.block.findings["shared memory of a wgmma changed before it was waited for"] += 1


_TABLE: dict[str, Callable[[Warpgroup, Instruction], Waits]] = {
    "bar.sync": _barrier, "ret": _return, "elect.sync": _elect, "setmaxnreg": _registers,
    "mbarrier.init": _init_barrier, "mbarrier.arrive": _arrive, "mbarrier.try_wait": _try_wait,
    "ld": _load, "st": _store, "ldmatrix": _tiles, "stmatrix": _tiles,
    "cp.async.bulk.tensor": _copy_box, "cp.async.bulk.global": _copy_bytes,
    "cp.async.bulk.commit_group": _commit_copies, "cp.async.bulk.wait_group": _wait_copies,
    "fence.proxy": _fence_proxy, "fence.mbarrier_init": _fence_barriers, "prefetch": _nothing,
    "wgmma.mma_async": _multiply, "wgmma.commit_group": _commit_products,
    "wgmma.wait_group": _wait_products, "wgmma.fence": _fence_products,
}  # fmt: skip
