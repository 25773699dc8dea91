"""What a compiled program communicates, and whether it works meanwhile: read from its HLO text.

Takes `compiled.as_text()`. A loop's body is counted once, as it stands there.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_WORK = {"fusion", "custom-call", "convolution", "dot", "while", "conditional"}
_ASYNC_CALLS = {"async-start", "call-start"}

_INSTRUCTION = re.compile(
    r"\s+(?:ROOT )?%?(?P<name>\S+) = (?P<type>.*?) (?P<op>[a-z][\w-]*)\((?P<rest>.*)"
)
_COMPUTATION = re.compile(r"(?:ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
_ARRAY = re.compile(r"\b(?P<dtype>pred|[a-z]+\d+\w*)\[(?P<shape>[\d,]*)\]")


class Collective(NamedTuple):
    """One collective of a program, as each device sees it.

    Attributes:
        kind: one of `KINDS`, whether asynchronous or not.
        dtype: of the first operand, as HLO writes it: "s8", "bf16".
        num_bytes: of what it sends or has summed: all operands; of a ragged all-to-all its rows.
        group_size: devices that take part together; of a permutation, the longest cycle or chain.
    """

    kind: str
    dtype: str
    num_bytes: int
    group_size: int


class Window(NamedTuple):
    """What lies between the start of a collective and its end.

    Attributes:
        work: instructions that compute.
        cycles: that the compiler expects them to take; 0 where it says nothing (GPUs, kernels).
    """

    kind: str
    work: int
    cycles: int


@dataclass(frozen=True)
class Instruction:
    """One line of a computation; `text` is what follows the operation's name."""

    name: str
    type: str
    op: str
    operands: tuple[str, ...]
    text: str


def collectives_of(hlo: str) -> list[Collective]:
    """The collectives of a module, in the order of its text."""
    return [c for body in computations(hlo).values() for c in _collectives(body, hlo)]


def _collectives(instructions: list[Instruction], hlo: str) -> Iterator[Collective]:
    types = {x.name: x.type for x in instructions}
    for x in instructions:
        kind = x.op.removesuffix("-start")
        if kind in KINDS:
            operands = x.operands[:1] if kind == "ragged-all-to-all" else x.operands
            arrays = [array for name in operands for array in _arrays(types[name])]
            num_bytes = sum(size for _, size in arrays)
            yield Collective(kind, arrays[0][0], num_bytes, _group_size(x.text, hlo))


def executed_collectives(hlo: str) -> list[tuple[Collective, int]]:
    """`collectives_of`, each with how often one run of the program comes by it."""
    times = executions(hlo)
    found = []
    for name, instructions in computations(hlo).items():
        if times.get(name):
            found += [(c, times[name]) for c in _collectives(instructions, hlo)]
    return found


def executions(hlo: str) -> Counter[str]:
    """How often one run comes by each computation, as far as trip counts are known.

    Branches of a conditional count as 0: the engine keeps there what a step rarely needs.
    """
    bodies, times = computations(hlo), Counter[str]()
    entry = re.search(r"^ENTRY %?([\w.-]+) ", hlo, re.MULTILINE)

    def visit(name: str, count: int) -> None:
        times[name] += count
        for x in bodies.get(name, ()):
            trips = _trips(x, bodies) if x.op == "while" else 1
            for called in re.findall(r"(?:calls|to_apply|body)=%?([\w.-]+)", x.text):
                visit(called, count * trips)

    if entry:
        visit(entry[1], 1)
    return times


def _trips(loop: Instruction, bodies: dict[str, list[Instruction]]) -> int:
    """Runs of a loop whose condition compares a counter from 0 with a constant; else 1."""
    condition = re.search(r"condition=%?([\w.-]+)", loop.text)
    inside = bodies.get(condition[1], []) if condition else []
    limits = {x.name: int(n[1]) for x in inside if (n := re.match(r"(\d+)\)", x.text))
              and x.op == "constant"}  # fmt: skip
    for x in inside:
        if x.op == "compare" and "direction=LT" in x.text and x.operands[1] in limits:
            return limits[x.operands[1]]
    return 1


def overlap(hlo: str) -> list[Window]:
    """The collectives that run beside other work, in the order in which they end.

    One that is a single instruction blocks, and has no window.

    Raises:
        ValueError: the module is not scheduled, so that its order says nothing.
    """
    if "is_scheduled=true" not in hlo.partition("\n")[0]:
        raise ValueError("the module is not scheduled: give the text of a compiled program")
    bodies = computations(hlo)
    windows = []
    for instructions in bodies.values():
        open_: dict[str, Window] = {}
        for x in instructions:
            kind = started(x, bodies)
            if kind is not None:
                open_[x.name] = Window(kind, 0, 0)
            elif x.op.endswith("-done") and x.operands[0] in open_:
                windows.append(open_.pop(x.operands[0]))
            elif x.op in _WORK:
                for name, (kind, work, cycles) in open_.items():
                    open_[name] = Window(kind, work + 1, cycles + _cycles(x.text))
    return windows


def started(x: Instruction, bodies: dict[str, list[Instruction]]) -> str | None:
    """The kind of collective that an instruction starts."""
    if x.op.removesuffix("-start") in KINDS and x.op.endswith("-start"):
        return x.op.removesuffix("-start")
    called = re.search(r"(?:calls|to_apply)=%?([\w.-]+)", x.text)
    if x.op not in _ASYNC_CALLS or called is None:
        return None
    inside = [y.op.removesuffix("-start") for y in bodies.get(called[1], ())]
    return next((op for op in inside if op in KINDS), None)


def computations(hlo: str) -> dict[str, list[Instruction]]:
    """The instructions of every computation of a module, in their order."""
    found: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in hlo.splitlines():
        if head := _COMPUTATION.match(line):
            current = found.setdefault(head["name"], [])
        elif match := _INSTRUCTION.match(line):
            text = match["rest"]
            operands = tuple(re.findall(r"%([\w.-]+)", text.partition("), ")[0]))
            current.append(Instruction(match["name"], match["type"], match["op"], operands, text))
    return found


def _arrays(type_text: str) -> Iterator[tuple[str, int]]:
    """Element type and bytes of each array of a type."""
    for array in _ARRAY.finditer(type_text):
        dtype = array["dtype"]
        bits = re.search(r"\d+", dtype)  # bf16, f8e4m3fn, s4, c64
        count = math.prod(int(n) for n in array["shape"].split(",") if n)
        yield dtype, -(-count * (int(bits[0]) if bits else 8) // 8)


def _group_size(text: str, hlo: str) -> int:
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", text):
        return _longest_chain(dict(re.findall(r"\{(\d+),(\d+)", pairs[1])))
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return len(listed[1].split(","))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", text):  # groups, and devices of each
        return int(iota[1])
    header = hlo.partition("\n")[0]  # no groups: all devices
    sizes = [re.search(rf"{name}=(\d+)", header) for name in ("num_partitions", "replica_count")]
    return math.prod(int(size[1]) for size in sizes if size)


def _longest_chain(target: dict[str, str]) -> int:
    """Devices of the longest way from source to target."""
    longest = 0
    for start in target:
        seen, device = {start}, target.get(start)
        while device is not None and device not in seen:
            seen.add(device)
            device = target.get(device)
        longest = max(longest, len(seen))
    return longest


def _cycles(text: str) -> int:
    found = re.search(r'"estimated_cycles":"(\d+)"', text)
    return int(found[1]) if found else 0
