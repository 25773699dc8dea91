"""What compilers say of the kernels in a program: instructions, and registers that do not suffice.

For TPUs that is the dump of scheduled bundles, one file for each instruction of the program, so a
kernel's are told from those that XLA puts around it by name. For Hopper it is the report of ptxas.
Neither is documented, and both are asked for by environment variables which a compiler reads once:
call `prepare` in a process that has compiled nothing for absent hardware yet.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_DUMP = "JAXSERVE_KERNEL_REPORT"


@dataclass(frozen=True)
class Kernel:
    """One kernel of a program.

    Attributes:
        spills: vector registers stored for lack of room, as often as the code says so (TPU); or
            bytes of each thread (GPU). Scalars of a TPU go to its scalar memory and are not meant.
        fills: the loads of them.
        loops: the depth of each loop on a TPU, in order, and its bundles of instructions outside of
            loops within. What is around them, and the loop over the grid, come first.
        branches: bundles of each stretch that a branch may skip on a TPU, and registers stored
            there for lack of room; in order, those only that hold no other of a quarter of them.
        spilling: what those stores and loads add to the bundles of a TPU, as a share of them.
        chains: cycles from the first instruction of a stretch without branches to the last one that
            waits for it, on a TPU, as its compiler believes them to be; in order, those over 100.
            A loop takes no fewer, and a bundle that waits is counted once.
        registers: of each thread of a GPU.
    """

    name: str
    spills: int
    fills: int
    loops: tuple[tuple[int, int], ...] = ()
    branches: tuple[tuple[int, int], ...] = ()
    spilling: float = 0.0
    chains: tuple[int, ...] = ()
    registers: int = 0

    @property
    def length(self) -> int:
        """Bundles of instructions, each counted once."""
        return sum(count for _, count in self.loops)


def prepare(folder: Path) -> None:
    """Has compilers of this process report into an empty folder. Libraries must not be loaded."""
    options = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {options}"
    os.environ |= {"MOSAIC_GPU_DUMP_PTXAS": "1", _DUMP: str(folder)}


def compile_with_report(lowered: Any) -> tuple[Any, list[Kernel]]:
    """A lowered program compiled, and its kernels in the order of their names.

    Raises:
        RuntimeError: compilers have not reported what was expected of them.
    """
    folder = Path(os.environ[_DUMP])
    with _caught() as said:
        compiled = lowered.compile()
    names = re.findall(r"%(\S+) = [^\n]*custom_call_target=\"tpu_custom_call\"", compiled.as_text())
    kernels = [_of_bundles(folder, name) for name in sorted(names)] or _of_ptxas(said)
    for file in folder.iterdir():
        file.unlink()
    if not kernels:
        raise RuntimeError("no report of a kernel: was prepare() called before compilers loaded?")
    return compiled, kernels


def _of_bundles(folder: Path, name: str) -> Kernel:
    """Of one row of numbers for each bundle, and a listing in which `>` is the depth of a loop."""
    table = _only(folder, f"*-{name}-*-final_hlo-static-per-bundle-utilization.txt")
    listing = _only(folder, f"*-{name}-*[0-9]-final_bundles.txt")
    _, columns, _, _, *rows = table.splitlines()
    names = [column.strip() for column in columns.split(",")]
    bundles = [dict(zip(names, map(int, row.split()), strict=True)) for row in rows]
    stored, loaded = ([b[unit] for b in bundles] for unit in ("VSTORE:SPILL", "VLOAD:FILL"))
    loops = tuple((depth, count) for depth, count in _loops(listing))
    branches = tuple((end - begin, sum(stored[begin:end])) for begin, end in _branches(listing))
    without, with_ = (
        _expanded(folder, f"*-{name}-*[0-9]-region-expansion{kind}.txt")
        for kind in ("-no-spills-fills", "")
    )
    blocks = _only(folder, f"*-{name}-*critical-path.txt").split("New basic block")
    lengths = (max(map(int, re.findall(r"Length to end: (\d+)", x)), default=0) for x in blocks)
    return Kernel(
        name, sum(stored), sum(loaded), loops, branches, with_ / without - 1,
        tuple(n for n in lengths if n > 100),
    )  # fmt: skip


def _only(folder: Path, pattern: str) -> str:
    found = list(folder.glob(pattern))
    if len(found) != 1:
        raise RuntimeError(f"{len(found)} of {pattern}, expected one: was prepare() called?")
    return found[0].read_text()


def _expanded(folder: Path, pattern: str) -> float:
    """How much longer the assignment of registers made the whole kernel; 1.0 if it is not said."""
    text = "".join(file.read_text() for file in folder.glob(pattern))
    found = re.search(r"^ordinal=0 .* expansion=(\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 1.0


def _branches(listing: str) -> list[tuple[int, int]]:
    """The first bundle and the one behind the last of each stretch that a branch may skip, without
    those that another fills by a quarter. What a branch leads to is named in a remark there."""
    waiting, found = dict[str, int](), list[tuple[int, int]]()
    for line in listing.splitlines():
        if not (bundle := re.match(r" *(?:0x)?([0-9a-f]+) +[A-Z]* *: >* *\{", line)):
            continue
        at = int(bundle[1], 16)
        for region in re.findall(r"(?:Start/End empty|End) region (\d+)", line):
            if region in waiting:
                found.append((waiting.pop(region), at))
        if branch := re.search(r"sbr\.rel .*target = \$region(\d+)", line):
            waiting[branch[1]] = at + 1
    within = [
        max((d - c for c, d in found if a <= c and d <= b and (a, b) != (c, d)), default=0)
        for a, b in found
    ]
    return sorted((a, b) for (a, b), most in zip(found, within, strict=True) if 4 * most < b - a)


def _loops(listing: str) -> list[list[int]]:
    """Depth and own bundles of each loop of a listing: `LB` begins one, and `>` is its depth, which
    an empty bundle does not say. Bundles of a loop around may stand within one."""
    loops = [[0, 0]]
    last, at = {0: loops[0]}, loops[0]
    for mark, depth, empty in re.findall(
        r"^ *(?:0x)?[0-9a-f]+ +([A-Z]*) *: (>*) *\{(\}?)", listing, re.MULTILINE
    ):
        if mark == "LB":
            last[len(depth)] = [len(depth), 0]
            loops.append(last[len(depth)])
        at = at if empty else last[len(depth)]
        at[1] += 1
    return loops


def _of_ptxas(said: list[str]) -> list[Kernel]:
    text = "".join(said)
    pattern = (
        r"properties for (\S+)\n.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers"
    )
    found = re.findall(pattern, text, re.DOTALL)
    return [Kernel(name, int(a), int(b), registers=int(c)) for name, a, b, c in found]


@contextmanager
def _caught() -> Iterator[list[str]]:
    """What compilers print meanwhile, past Python's own streams."""
    said = list[str]()
    with tempfile.TemporaryFile("w+") as file:
        sys.stdout.flush()
        before = os.dup(1)
        os.dup2(file.fileno(), 1)
        try:
            yield said
        finally:
            sys.stdout.flush()
            os.dup2(before, 1)
            os.close(before)
            file.seek(0)
            said.append(file.read())
