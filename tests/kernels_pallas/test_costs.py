"""Floors of cases: what a kernel cannot do without, by another count."""

import pytest

from kernels_pallas.flash_attention import flash_attention, flash_attention_gradient
from kernels_pallas.paged_attention.ops import page_attention, page_write

KEYS = 32 * 8192


def outside(N: int) -> int:
    """Bytes of queries in bfloat16, outputs and sums of 32 tokens."""
    return 32 * N * (2 * 576 + 4 * 512 + 4)


@pytest.mark.parametrize(
    ("name", "N", "row"),
    [
        ("latent-decode-8k", 128, 2 * 576),
        ("latent-decode-8k-16-heads", 16, 2 * 576),
        ("int8-latent-decode-8k", 128, 576 + 2 * 4),
        ("int4-latent-decode-8k", 128, 640 / 2 + 5 * 4),  # turned by whole parts of 128
    ],
)
def test_rows_of_latent_keys_count_what_must_be_brought(name, N, row):
    assert page_attention.case(name).cost.bytes == KEYS * row + outside(N)


def test_rows_written_in_four_bits_count_all_their_scales():
    cost = page_write.case("int4-latent-decode-128").cost
    assert cost.bytes == 128 * (2 * 576 + 640 / 2 + 5 * 4)


def test_few_heads_wait_for_memory_where_many_multiply():
    """By an H200's published rates."""
    moved, multiplied = 4.8e12, 989e12
    few, many = (page_attention.case(f"latent-decode-8k{x}").cost for x in ("-16-heads", ""))
    assert few.bytes / moved > 5 * few.flops / multiplied
    assert many.bytes / moved < many.flops / multiplied


@pytest.mark.parametrize(("name", "T", "window"), [("4k", 4096, 4096), ("8k-window", 8192, 1024)])
def test_pairs_of_a_window_are_counted_one_by_one(name, T, window):
    pairs = sum(min(i + 1, window) for i in range(T))
    flops = 2 * 32 * pairs * 2 * 128
    assert flash_attention.case(name).cost.flops == flops
    assert flash_attention_gradient.case(name).cost.flops == 2.5 * flops
