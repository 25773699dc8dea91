"""Reports as compilers write them, read without a compiler."""

import pytest

from sharding.kernel_report import Kernel, _branches, _loops, _of_bundles, _of_ptxas

LISTING = """
= control target key start
LB: loop body
     0   :  { %s2767_s0 = inlined_call_operand.<no memory space> }
   0x1   :  { %2795 = sst [smem:[#allocation32_spill]] %s2768_s1 }
   0x2 LB: > { %s1 = sadd.s32 1, %s2 }
   0x3   : > { %s3 = sadd.s32 1, %s1 }
   0x4 LB: >> { %s4 = sadd.s32 1, %s1 }
   0x5 LB: >> { %s5 = sadd.s32 1, %s1 }
   0x6   :  {}
   0x7   : >> { %s5 = sadd.s32 1, %s1 }
   0x8   : > { %s3 = sadd.s32 (%p7), 1, %s1 }
   0x9   : >> { %s5 = sadd.s32 1, %s1 }
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
CHAINS = """
New basic block in region: region0 {members=2 hlo=attend.1 parent=-1}
  Length to end: 16, %s6840 = sld [smem:[#allocation13 + $0x20]]

New basic block in region: region8 {members=46 hlo=attend.1 parent=0}
  Length to end: 140, %1115 = vmatmul.mubr.bf16.vlgmr.msra.gmra.mxu0 %v6919
  Length to end: 38, %v1117 = vpop.f32.mrf.mxu0
"""
PTXAS = """ptxas info    : Compiling entry function 'page_attention_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for page_attention_mosaic_gpu_kernel
    0 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
"""


def test_loops_nest_and_follow_each_other():
    assert _loops(LISTING) == [[0, 3], [1, 4], [2, 1], [2, 4]]


def test_a_kernel_is_told_from_its_neighbours(tmp_path):
    for name in ("attend.1", "fusion.3"):
        rows = ROWS if name == "attend.1" else ROWS.replace("2 0\n", "0 0\n")
        at = f"179-{name}-70-final_hlo-static-per-bundle-utilization.txt"
        (tmp_path / at).write_text(rows)
        (tmp_path / f"179-{name}-72-final_bundles.txt").write_text(LISTING)
        at = f"179-{name}-67-region-expansion"
        (tmp_path / f"{at}.txt").write_text("ordinal=0 before=8 after=10 expansion=1.25\n")
        (tmp_path / f"{at}-no-spills-fills.txt").write_text("")
        (tmp_path / f"179-{name}-24-critical-path.txt").write_text(CHAINS)
        (tmp_path / f"179-{name}-71-schedule-analysis_final_bundles.txt").write_text("")
    found = _of_bundles(tmp_path, "attend.1")
    assert found == Kernel("attend.1", 3, 3, ((0, 3), (1, 4), (2, 1), (2, 4)), (), 0.25, (140,))
    assert found.length == 12
    with pytest.raises(RuntimeError, match="was prepare"):
        _of_bundles(tmp_path, "copy")


BRANCHES = """
   0x8   : > { %816 = sbr.rel (%p1_p1) target = $region5 }
   0x9   : > { %817 = sbr.rel (%p2_p1) target = $region6 }
   0xa   :  {} /* End region 4 */
   0xb   : > { %818 = sbr.rel (%p2_p1) target = $region7 }
   0xc   : > { %v1_v1 = vld [vmem:[%s2] sm:$0xff] }
   0xd PF: > { %p3 = scmp.ne.s32 %s1, 0 } /* Start/End empty region 7 :: Start region 8 */
   0xe   :  {}
  0x10   : > { %p3 = scmp.ne.s32.totalorder %s1, 0 } /* End region 6 */
  0x11 PF: > { %p4 = scmp.ne.s32.totalorder %s1, 0 } /* Start/End empty region 5 */
  0x12   : > { %819 = sbr.rel (%p1_p1) target = $region1 }
"""


def test_branches_that_hold_little_else():
    """The first one's eight bundles are filled by the second one's, which hold a short one."""
    assert _branches(BRANCHES) == [(0xA, 0x10), (0xC, 0xD)]


def test_what_ptxas_says():
    expected = Kernel("page_attention_mosaic_gpu_kernel", 8, 12, registers=168)
    assert _of_ptxas([PTXAS]) == [expected]
