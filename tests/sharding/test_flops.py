"""Operations of compiled programs: counted from HLO as a TPU's compiler writes it."""

from __future__ import annotations

import pytest

from sharding import flops, hlo

HLO = """\
HloModule step, is_scheduled=true, num_partitions=8

%fused (p0: bf16[16,256], p1: bf16[256,128]) -> bf16[16,128] {
  %p0 = bf16[16,256]{1,0} parameter(0)
  %p1 = bf16[256,128]{1,0} parameter(1)
  ROOT %c = bf16[16,128]{1,0} convolution(%p0, %p1), dim_labels=bf_io->bf
}

%body (s: (s32[], bf16[16,256])) -> (s32[], bf16[16,256]) {
  %s = (s32[], bf16[16,256]{1,0}) parameter(0)
  %x = bf16[16,256]{1,0} get-tuple-element(%s), index=1
  %w = bf16[256,128]{1,0} constant(0)
  %go = ((bf16[16,256]{1,0}), bf16[16,256]{1,0}) all-to-all-start(%x), replica_groups={{0,1,2,3}}
  %inside = bf16[16,128]{1,0} fusion(%x, %w), kind=kOutput, calls=%fused
  %kernel.3 = bf16[16,128]{1,0} custom-call(%inside), custom_call_target="tpu_custom_call"
  %come = bf16[16,256]{1,0} all-to-all-done(%go)
  %outside = bf16[16,128]{1,0} fusion(%come, %w), kind=kOutput, calls=%fused
  ROOT %t = (s32[], bf16[16,256]{1,0}) tuple(%s, %come)
}

%condition (c: (s32[], bf16[16,256])) -> pred[] {
  %c = (s32[], bf16[16,256]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %limit = s32[] constant(5)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (a: (s32[], bf16[16,256]), q: s8[32,64], k: s8[4,128,64]) -> s32[] {
  %a = (s32[], bf16[16,256]{1,0}) parameter(0)
  %q = s8[32,64]{1,0} parameter(1)
  %k = s8[4,128,64]{2,1,0} parameter(2)
  %loop = (s32[], bf16[16,256]{1,0}) while(%a), condition=%condition, body=%body
  %int8_matmul.1 = bf16[32,128]{1,0} custom-call(%q, %k), custom_call_target="tpu_custom_call"
  ROOT %r = s32[] get-tuple-element(%loop), index=0
}
"""
ONE = 2 * 16 * 256 * 128


def test_loops_count_as_often_as_they_run():
    times = hlo.executions(HLO)
    assert times["main"] == 1 and times["body"] == 5 and times["fused"] == 10
    ((found, count),) = hlo.executed_collectives(HLO)
    assert (found.kind, found.dtype, found.num_bytes, found.group_size) == (
        "all-to-all", "bf16", 16 * 256 * 2, 4,
    )  # fmt: skip
    assert count == 5


def test_what_lies_under_a_collective():
    work = flops.by_window(HLO, {"kernel": 1e6})
    assert work.total == 5 * (2 * ONE + 1e6) + 2 * 32 * 64 * 128
    assert work.overlapped == 5 * (ONE + 1e6)
    assert work.share == pytest.approx(work.overlapped / work.total)


def test_batches_of_products_are_windows_of_one():
    """A product for each of 8 heads: the window has 8 places, and dilation shows it one."""
    text = """\
HloModule heads, is_scheduled=true

ENTRY %main (x: bf16[8,4,64], w: bf16[8,64,32]) -> bf16[8,4,32] {
  %x = bf16[8,4,64]{2,1,0} parameter(0)
  %w = bf16[8,64,32]{2,1,0} parameter(1)
  ROOT %y = bf16[8,4,32]{2,1,0} convolution(%x, %w), window={size=8 stride=7 pad=0_0 lhs_dilate=8}, dim_labels=0bf_0io->0bf
}
"""  # noqa: E501
    assert flops.by_window(text, {}).total == 8 * 2 * 4 * 64 * 32
