"""Reports as compilers write them, read without a compiler."""

import pytest

from sharding.kernel_report import Kernel, _loops, _of_bundles, _of_ptxas

LISTING = """
= control target key start
LB: loop body
     0   :  { %s2767_s0 = inlined_call_operand.<no memory space> }
   0x1   :  { %2795 = sst [smem:[#allocation32_spill]] %s2768_s1 }
   0x2 LB: > { %s1 = sadd.s32 1, %s2 }
   0x3   : > { %s3 = sadd.s32 1, %s1 }
   0x4 LB: >> { %s4 = sadd.s32 1, %s1 }
   0x5 LB: >> { %s5 = sadd.s32 1, %s1 }
   0x6   : >> { %s5 = sadd.s32 1, %s1 }
   0xa PF: > { %v448_v1 = vld [vmem:[%s2299_s22 + $0x188] sm:$0xff] }
   0xb   :  { %s6 = sadd.s32 1, %s1 }
"""
ROWS = """== CAPACTIY:
MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    2     2     4     2     1     3     3     2     2     2
== UTILIZATION:
0 0 0 0 0 0 0 0 2 0
1 0 0 0 0 1 3 0 0 0
0 0 4 0 0 0 0 1 1 0
"""
PTXAS = """ptxas info    : Compiling entry function 'page_attention_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for page_attention_mosaic_gpu_kernel
    0 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
"""


def test_loops_nest_and_follow_each_other():
    assert _loops(LISTING) == [[0, 3], [1, 3], [2, 1], [2, 2]]


def test_a_kernel_is_told_from_its_neighbours(tmp_path):
    for name in ("attend.1", "fusion.3"):
        rows = ROWS if name == "attend.1" else ROWS.replace("2 0\n", "0 0\n")
        at = f"179-{name}-70-final_hlo-static-per-bundle-utilization.txt"
        (tmp_path / at).write_text(rows)
        (tmp_path / f"179-{name}-72-final_bundles.txt").write_text(LISTING)
        (tmp_path / f"179-{name}-71-schedule-analysis_final_bundles.txt").write_text("")
    found = _of_bundles(tmp_path, "attend.1")
    assert found == Kernel("attend.1", 3, 3, ((0, 3), (1, 3), (2, 1), (2, 2)))
    assert found.length == 9
    with pytest.raises(RuntimeError, match="was prepare"):
        _of_bundles(tmp_path, "copy")


def test_what_ptxas_says():
    expected = Kernel("page_attention_mosaic_gpu_kernel", 8, 12, registers=168)
    assert _of_ptxas([PTXAS]) == [expected]
