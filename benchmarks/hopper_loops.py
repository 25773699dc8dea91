"""What Hopper's kernels do in their loops: `python -m benchmarks.hopper_loops --ops sample`.

Nothing runs and no clock is read: every shipped case is compiled for an H200 that is not there, its
PTX is assembled and disassembled again (`pip install nvidia-cuda-nvcc nvidia-cuda-nvdisasm`, or a
CUDA toolkit), and each innermost loop is listed with what one pass of it asks of a core.

Cycles of pipes are floors, from how many lanes a quarter of a core has. `alone_cycles` is a model:
one warp issues in order, with the stalls that the compiler wrote into the code; what takes as long
as it takes (exponentials, barriers, products) takes what is assumed below, and whatever is waited
for in memory is there. Warpgroups of a core overlap: then neither a pipe's sum nor the longest of
them can be beaten. It compares two forms of a loop before a card can, and predicts no time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.compiled import TARGETS, abstract, shipped
from benchmarks.kernels import versions
from benchmarks.programs import runner
from benchmarks.records import machine
from sharding import compile_only

# Pipes of a quarter of a core, and the cycles of one instruction of a warp in them.
_PIPES = {
    "fma": (1, "FFMA FADD FMUL IMAD HFMA2 HADD2 HMUL2"),
    "alu": (
        2,
        "ISETP FSETP PLOP3 FSEL SEL LOP3 FMNMX VIMNMX F2FP I2FP PRMT SHF LEA IADD3 VIADD MOV",
    ),
    "special": (8, "MUFU I2F F2I F2F I2I"),
    "shared": (4, "LDS STS LDSM STSM SHFL"),  # four quarters share it
}
_OF = {name: (pipe, cycles) for pipe, (cycles, names) in _PIPES.items() for name in names.split()}
_LATENCY = {"special": 20, "shared": 28, "other": 25}  # cycles until a result is there: assumed
_MEET = {"BAR": 15, "MEMBAR": 20, "FENCE": 10}  # cycles that a barrier or a fence takes: assumed
_BEGIN, _END = 10, 30  # cycles before a product begins, and from its end until it is seen: assumed


@dataclass(frozen=True)
class Instruction:
    """One of a warp's, with what the compiler wrote beside it.

    Attributes:
        stall: cycles until the next may be issued.
        sets, reads: the counters that say when its result is there, and its operands are read; 7
            for none.
        waits: a bit for each counter that it waits for.
    """

    text: str
    stall: int = 1
    sets: int = 7
    reads: int = 7
    waits: int = 0

    @property
    def name(self) -> str:
        return re.sub(r"^@!?U?P\w+\s+", "", self.text).split()[0]

    @property
    def cost(self) -> tuple[str, int]:
        """The pipe, and its cycles."""
        name = self.name
        if shape := re.match(r"[HIQ]GMMA\.64x(\d+)x", name):
            return "matrix", int(shape[1]) // 2  # 4096 operations of 16 bits a cycle, 8192 of 8
        return _OF.get(name.split(".")[0], ("other", 1))

    @property
    def target(self) -> str | None:
        found = re.search(r"\bBRA\b.*\((\.L\w+)\)", self.text)
        return found[1] if found else None


def read(listing: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions of `nvdisasm -c -hex`, and where labels stand."""
    code, labels, text = list[Instruction](), dict[str, int](), None
    for line in listing.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(code)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;\s+/\* 0x[0-9a-f]+ \*/", line):
            text = found[1]
        elif text and (found := re.match(r"\s+/\* 0x([0-9a-f]{16}) \*/", line)):
            bits = int(found[1], 16)  # the upper half of 128
            fields = bits >> 41 & 15, bits >> 46 & 7, bits >> 49 & 7, bits >> 52 & 63
            code.append(Instruction(text, *fields))
            text = None
    return code, labels


def loops(code: Sequence[Instruction], labels: dict[str, int]) -> Iterator[list[Instruction]]:
    """The path of each innermost loop. Branches forward are taken, as they skip what is rare, but
    not past a copy or half of the loop. Loops of a few instructions are not meant, for they wait,
    and neither are ways back from where a waiter naps, behind the kernel's end."""
    back = [(labels.get(x.target or "", i), i) for i, x in enumerate(code)]
    back = [
        (begin, end) for begin, end in back
        if end - begin > 10 and not any("NANOSLEEP" in x.text for x in code[begin:end])
    ]  # fmt: skip

    def skips(i: int, to: int, begin: int, end: int) -> bool:
        rare = not any("UTMALDG" in x.text for x in code[i:to])
        return i < to <= end and rare and to - i <= (end - begin) // 2

    for begin, end in back:
        if any(begin <= low and high < end for low, high in back if (low, high) != (begin, end)):
            continue
        path, i = [], begin
        while i <= end:
            path.append(code[i])
            to = labels.get(code[i].target or "", -1)
            i = to if skips(i, to, begin, end) else i + 1
        yield path


def alone(path: Sequence[Instruction], passes: int = 4) -> float:
    """Cycles of one pass by a warp whose quarter of a core nobody else uses, in the long run."""
    now, first, done = 0.0, 0.0, 0.0
    free, there = Counter[str](), [0.0] * 8
    for n in range(passes):
        first = now if n == 1 else first
        for x in path:
            (pipe, cycles), kind = x.cost, x.name.split(".")[0]
            now = max([now, *(there[i] for i in range(6) if x.waits >> i & 1)])
            now += _MEET.get(kind, 0)
            if x.name.startswith("WARPGROUP.DEPBAR"):
                now = max(now, done)
            if pipe == "matrix":
                free[pipe] = max(now + _BEGIN, free[pipe]) + cycles
                done = free[pipe] + _END
            else:
                now = max(now, free[pipe])
                free[pipe] = now + cycles
            there[x.sets] = max(there[x.sets], now + _LATENCY.get(pipe, 10))
            there[x.reads] = max(there[x.reads], now + 10)
            now += max(1, x.stall)
    return (now - first) / (passes - 1)


def described(path: Sequence[Instruction]) -> dict[str, float]:
    """One pass of a loop: instructions, cycles by pipe, where warpgroups wait, and `alone`."""
    pipes, kinds = Counter[str](), Counter(x.name.split(".")[0] for x in path)
    for x in path:
        pipe, cycles = x.cost
        pipes[pipe] += cycles if pipe != "other" else 0
    meetings = sum(kinds[kind] for kind in (*_MEET, "SYNCS"))
    rest = {f"{pipe}_cycles": pipes[pipe] for pipe in ("matrix", *_PIPES)}
    return {"issued": len(path), **rest, "meetings": meetings, "alone_cycles": round(alone(path))}


def machine_code(folder: Path) -> Iterator[tuple[str, str]]:
    """Names and listings of the kernels that were compiled into the folder, which is emptied."""
    for ptx in sorted(folder.glob("*.ptx")):
        cubin = ptx.with_suffix(".cubin")
        subprocess.run(["ptxas", "-arch=sm_90a", ptx, "-o", cubin], check=True)
        said = subprocess.run(
            ["nvdisasm", "-c", "-hex", cubin], check=True, capture_output=True, text=True
        )
        yield ptx.stem, said.stdout
    for file in folder.iterdir():
        file.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ops", nargs="*", default=[])
    parser.add_argument("--cases", nargs="*", default=[])
    parser.add_argument("--least", type=int, default=60, help="instructions of a loop that counts")
    args = parser.parse_args()
    for tool in ("ptxas", "nvdisasm"):
        if not shutil.which(tool):
            parser.error(f"no {tool} on the PATH: it comes with nvidia-cuda-nvcc and -nvdisasm")
    said = subprocess.run(["ptxas", "--version"], check=True, capture_output=True, text=True).stdout
    here = {key: machine()[key] for key in ("commit", "date")}
    print(json.dumps({"target": "sm_90a", "ptxas": said.split()[-1], **versions(), **here}))
    jax.config.update("jax_enable_compilation_cache", False)
    sharding = NamedSharding(compile_only.mesh(TARGETS["h200"]), PartitionSpec())
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"MOSAIC_GPU_DUMP_TO": folder, "MOSAIC_GPU_DUMP_PTX": "1"}
        for op, name, case in shipped("h200", args.ops, args.cases):
            jax.jit(runner(op, case, name, None)).lower(abstract(case, sharding)).compile()
            for kernel, listing in machine_code(Path(folder)):
                for path in loops(*read(listing)):
                    if len(path) >= args.least:
                        line = {"op": op.name, "case": case.name, "kernel": kernel}
                        print(json.dumps(line | described(path)), flush=True)


if __name__ == "__main__":
    main()
