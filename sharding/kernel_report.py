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
        registers: of each thread of a GPU.
    """

    name: str
    spills: int
    fills: int
    loops: tuple[tuple[int, int], ...] = ()
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
    found = list(folder.glob(f"*-{name}-*-final_hlo-static-per-bundle-utilization.txt"))
    listing = list(folder.glob(f"*-{name}-*[0-9]-final_bundles.txt"))
    if len(found) != 1 or len(listing) != 1:
        raise RuntimeError(f"{len(found)} reports of {name}, expected one: was prepare() called?")
    _, columns, _, _, *rows = found[0].read_text().splitlines()
    names = [column.strip() for column in columns.split(",")]
    bundles = [dict(zip(names, map(int, row.split()), strict=True)) for row in rows]
    spills, fills = (sum(b[unit] for b in bundles) for unit in ("VSTORE:SPILL", "VLOAD:FILL"))
    loops = tuple((depth, count) for depth, count in _loops(listing[0].read_text()))
    return Kernel(name, spills, fills, loops)


def _loops(listing: str) -> list[list[int]]:
    """Depth and own bundles of each loop of a listing: `LB` begins one, and `>` is its depth."""
    loops = [[0, 0]]
    open_ = loops[:]
    for mark, depth in re.findall(
        r"^ *(?:0x)?[0-9a-f]+ +([A-Z]*) *: (>*) *\{", listing, re.MULTILINE
    ):
        open_ = open_[: len(depth) + (mark != "LB")]
        if mark == "LB":
            open_ = [*open_, [len(depth), 0]]
            loops.append(open_[-1])
        open_[-1][1] += 1
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
