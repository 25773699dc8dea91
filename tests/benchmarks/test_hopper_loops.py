"""Loops of machine code are found, and their passes added up, in a listing written by hand."""

import pytest

from benchmarks.hopper_loops import Instruction, alone, described, loops, read


def listing(*lines: str) -> str:
    """As nvdisasm prints it; a line is an instruction, its stall and its waits, or a label."""
    out = list[str]()
    for i, line in enumerate(lines):
        if line.endswith(":"):
            out.append(line)
            continue
        text, stall, waits = line.split("|")
        upper = int(stall) << 41 | 7 << 46 | 7 << 49 | int(waits, 2) << 52
        out.append(f"        /*{16 * i:04x}*/    {text} ;    /* 0x0123456789abcdef */")
        out.append(f"                             /* 0x{upper:016x} */")
    return "\n".join(out)


LOOP = listing(
    "FADD R1, R1, R2|4|0",
    ".L_1:",
    "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, gsb0|2|0",
    *["FMUL R2, R2, R3|1|0"] * 8,
    "@P0 BRA `(.L_2)|5|0",  # taken: what it skips is rare
    *["MUFU.EX2 R3, R4|1|0"] * 8,
    ".L_2:",
    "WARPGROUP.DEPBAR.LE gsb0, 0x0|3|0",
    "@P1 BRA `(.L_1)|5|0",
    "EXIT|5|0",
    ".L_3:",
    *["NANOSLEEP|1|0"] * 12,
    "BRA `(.L_1)|5|0",  # from behind the end, where what waits has its loops
)


def test_a_loop_is_what_branches_back():
    (path,) = loops(*read(LOOP))
    names = [x.name for x in path]
    assert names == ["HGMMA.64x128x16.F32.BF16", *["FMUL"] * 8, "BRA", "WARPGROUP.DEPBAR.LE", "BRA"]
    assert [x.stall for x in path[:2]] == [2, 1]


def test_pipes_are_added_up_and_products_waited_for():
    (path,) = loops(*read(LOOP))
    found = described(path)
    assert found["issued"] == 12
    assert (found["matrix_cycles"], found["fma_cycles"], found["special_cycles"]) == (64, 8, 0)
    assert found["alone_cycles"] == pytest.approx(64 + 10 + 30 + 3 + 5, abs=3)


def test_a_pipe_that_is_taken_is_waited_for():
    exponentials = [Instruction("MUFU.EX2 R3, R4")] * 32
    assert alone(exponentials) == pytest.approx(32 * 8, abs=8)
    assert alone([Instruction("FADD R1, R1, R2", stall=4)] * 32) == 32 * 4


def test_results_are_waited_for():
    """A counter that an instruction sets, and another one waits for."""
    load = Instruction("LDS R1, [R2]", sets=0)
    use = Instruction("FADD R1, R1, R3", waits=1)
    assert alone([load, use]) > alone([load, Instruction("FADD R4, R4, R3")]) + 20
