"""Registers that kernels store for lack of room: none, but for those named here, all for TPUs.

Counted in the code, each as often as it stands there, by libtpu 0.0.42 and in bodies' own tiles. A
count is a bound: more fails the test, and who brings one down lowers it here. What is stored for
lack of room takes slots of bundles that are idle while the matrix unit works, so a tile that spills
nothing is not the faster one as a rule; what it would cost is said where it was counted.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Bound(NamedTuple):
    """Spills of an op's cases, as far as their names begin like that."""

    op: str
    cases: str
    reason: str
    most: dict[str, int]


BOUNDS = (
    Bound(
        "int8_matmul", "(2048|7168)x.*",
        "parts of 256 rows instead of 512 spill nothing on v5e and v5p, in 2 % more bundles, and "
        "148 on v6e in 13 % more; 0 there needs parts of 128 x 128, and 2.7 times the bundles. "
        "Blocks in one part spilled 2703 (v5e) and 3140 (v6e; 3 % fewer bundles)",
        {"v5e": 521, "v5p": 521, "v6e": 1211, "tpu7x": 0},
    ),
    Bound(
        "grouped_matmul", ".*-int8-.*",
        "weights arrive more slowly than they are multiplied: nothing is lost by these few",
        {"v5e": 21, "v5p": 21},
    ),
    Bound(
        "page_attention", "decode-32k-mass",
        "sums of pages are one more product, of float32, beside the softmax",
        {"v5e": 299, "v5p": 297, "v6e": 450, "tpu7x": 413},
    ),
    Bound(
        "page_attention", "(decode|mixed).*",
        "128 rows of 512 keys fill all 64 registers; 256 keys spill 0 to 4, and take 46 (v5e) to "
        "74 % (v6e) more bundles where prompts are attended. Decoding waits for memory in either",
        {"v5e": 50, "v5p": 47, "v6e": 64, "tpu7x": 62},
    ),
    Bound(
        "page_attention", "latent.*",
        "128 heads of 576 lanes share a key: rows, scores and outputs do not fit side by side",
        {"v5e": 201, "v5p": 196, "v6e": 199, "tpu7x": 79},
    ),
    Bound(
        "page_attention", "int8-latent.*",
        "as with latent pages of floats, and keys of eight bits become bfloat16 on their way",
        {"v5e": 501, "v5p": 499, "v6e": 350, "tpu7x": 292},
    ),
    Bound(
        "page_attention", "int8-.*",
        "as with pages of floats, and steps of keys and values beside them",
        {"v5e": 69, "v5p": 64, "v6e": 96, "tpu7x": 96},
    ),
    Bound(
        "page_attention", "int4-latent.*",
        "as with eight bits; five parts with steps of their own are five products, not two. "
        "Outputs turn back by 32 rows and a part at a time for nothing; by 128 rows, 115 to 208",
        {"v5e": 845, "v5p": 846, "v6e": 598, "tpu7x": 525},
    ),
    Bound(
        "page_attention", "int4-.*",
        "as with eight bits, in as many bundles",
        {"v5e": 73, "v5p": 67, "v6e": 93, "tpu7x": 89},
    ),
    Bound(
        "page_write", "int4-latent.*",
        "64 rows, whole tiles of nibbles, of five parts are turned and rounded at a time",
        {"v5e": 61, "v5p": 58, "v6e": 193, "tpu7x": 188},
    ),
    Bound(
        "page_write", "int4-.*",
        "eight registers of rows are turned at a time, beside their neighbours and masks",
        {"v5e": 8, "v5p": 8},
    ),
    Bound(
        "page_write", "int8-latent.*",
        "a row of 640 lanes is rounded at a time; writing waits for memory",
        {"v5e": 23, "v5p": 29, "v6e": 15, "tpu7x": 3},
    ),
    Bound(
        "flash_attention", ".*",
        "512 queries by 512 keys: tiles of 128 spill 16 to 31 and take 2.3 (v5e) to 3.4 (v6e) "
        "times the bundles; 256 by 256 spill a tenth, in 30 to 60 % more",
        {"v5e": 5564, "v5p": 5559, "v6e": 5644, "tpu7x": 6290},
    ),
    Bound(
        "flash_attention_gradient", ".*",
        "both kernels together; tiles as in the forward pass, and five products instead of two",
        {"v5e": 8441, "v5p": 8424, "v6e": 9624, "tpu7x": 8477},
    ),
)  # fmt: skip


def most(op: str, case: str, device: str) -> int:
    """Spills that are allowed."""
    found = (b for b in BOUNDS if b.op == op and re.fullmatch(b.cases, case))
    return next((bound.most.get(device, 0) for bound in found), 0)
