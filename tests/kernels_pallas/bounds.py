"""What compiled kernels may take: registers that TPUs store for lack of room, and temporaries.

No kernel for Hopper spills. On TPUs none does but those named here. Counted in the code, each as
often as it stands there, in bodies' own tiles. A count is a bound: more fails the test, and who
brings one down lowers it here. What is stored for lack of room takes slots of bundles that are idle
while the matrix unit works, so a tile that spills nothing is not the faster one as a rule; what it
would cost is said where it was counted.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.metadata import version
from typing import NamedTuple

from kernels_pallas.op import Case

DEVICES = ("v5e", "v5p", "v6e", "tpu7x")


class Bound(NamedTuple):
    """Spills of an op's cases, as far as their names begin like that, on each of `DEVICES`."""

    op: str
    cases: str
    reason: str
    older: tuple[int, ...]  # by libtpu 0.0.42, of jax 0.10
    newer: tuple[int, ...]  # by libtpu 0.0.50, of jax 0.12


BOUNDS = (
    Bound(
        "int8_matmul", "(2048|7168)x.*",
        "parts of 256 rows instead of 512 spill nothing on v5e and v5p, in 2 % more bundles, and "
        "148 on v6e in 13 % more; 0 there needs parts of 128 x 128, and 2.7 times the bundles. "
        "Blocks in one part spilled 2703 (v5e) and 3140 (v6e; 3 % fewer bundles)",
        (521, 521, 1211, 0), (520, 520, 1108, 0),
    ),
    Bound(
        "grouped_matmul", ".*-int8-.*",
        "weights arrive more slowly than they are multiplied: nothing is lost by these few",
        (21, 21, 0, 0), (0, 0, 0, 0),
    ),
    Bound(
        "page_attention", "decode-32k-mass",
        "sums of pages are one more product, of float32, beside the softmax",
        (299, 297, 450, 413), (304, 306, 483, 416),
    ),
    Bound(
        "page_attention", "(decode|mixed).*",
        "128 rows of 512 keys fill all 64 registers; 256 keys spill 0 to 4, and take 46 (v5e) to "
        "74 % (v6e) more bundles where prompts are attended. Decoding waits for memory in either",
        (50, 47, 64, 62), (52, 49, 76, 75),
    ),
    Bound(
        "page_attention", "latent.*",
        "128 heads of 576 lanes share a key: rows, scores and outputs do not fit side by side",
        (201, 196, 199, 79), (168, 186, 170, 81),
    ),
    Bound(
        "page_attention", "int8-latent.*",
        "as with latent pages of floats, and keys of eight bits become bfloat16 on their way",
        (501, 499, 350, 292), (499, 506, 330, 334),
    ),
    Bound(
        "page_attention", "int8-.*",
        "as with pages of floats, and steps of keys and values beside them",
        (69, 64, 96, 96), (65, 65, 110, 114),
    ),
    Bound(
        "page_attention", "int4-latent.*",
        "as with eight bits; five parts with steps of their own are five products, not two. "
        "Outputs turn back by 32 rows and a part at a time for nothing; by 128 rows, 115 to 208",
        (845, 846, 598, 525), (836, 868, 503, 512),
    ),
    Bound(
        "page_attention", "int4-.*",
        "as with eight bits, in as many bundles",
        (73, 67, 93, 89), (63, 69, 110, 117),
    ),
    Bound(
        "page_write", "int4-latent.*",
        "64 rows, whole tiles of nibbles, of five parts are turned and rounded at a time",
        (61, 58, 193, 188), (58, 62, 211, 174),
    ),
    Bound(
        "page_write", "int4-.*",
        "eight registers of rows are turned at a time, beside their neighbours and masks",
        (8, 8, 0, 0), (14, 26, 0, 0),
    ),
    Bound(
        "page_write", "int8-latent.*",
        "a row of 640 lanes is rounded at a time; writing waits for memory",
        (23, 29, 15, 3), (23, 24, 12, 3),
    ),
    Bound(
        "flash_attention", ".*",
        "512 queries by 512 keys: tiles of 128 spill 16 to 31 and take 2.3 (v5e) to 3.4 (v6e) "
        "times the bundles; 256 by 256 spill a tenth, in 30 to 60 % more",
        (5564, 5559, 5644, 6290), (5597, 5587, 5783, 6355),
    ),
    Bound(
        "flash_attention_gradient", ".*",
        "both kernels together; tiles as in the forward pass, and five products instead of two",
        (8441, 8424, 9624, 8477), (8264, 8232, 9700, 8538),
    ),
)  # fmt: skip


IN_HBM = {
    ("page_write", "decode-256"): 2**20,
    ("page_attention", "int4-latent-decode-8k"): 20e6,
}
"""Bytes of the step's rows that libtpu 0.0.50 leaves in the HBM of a v5p, between their padding and
turning and the kernel; 0.0.42 had them in VMEM. Over the rule below, and not mended yet."""


@cache
def _newer() -> bool:
    return tuple(map(int, version("libtpu").split(".")[:3])) >= (0, 0, 50)


def spills(op: str, case: str, device: str) -> int:
    """Vector registers (TPU) or bytes of a thread (GPU) that may be stored for lack of room."""
    if device not in DEVICES:
        return 0
    found = (b for b in BOUNDS if b.op == op and re.fullmatch(b.cases, case))
    counts = next(((b.older, b.newer) for b in found), ((0,) * 4,) * 2)
    return counts[_newer()][DEVICES.index(device)]


def temporaries(op: str, case: Case, device: str) -> float:
    """Bytes: a tenth of what the case reads and writes, and a MiB."""
    assert case.cost
    left = IN_HBM.get((op, case.name), 0) if device == "v5p" and _newer() else 0
    return 0.1 * case.cost.bytes + 2**20 + left
