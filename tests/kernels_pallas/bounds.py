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
        "sums of 256 rows and 256 columns fill all registers, and so do they fill a v6e's matrix "
        "unit: it takes 64 cycles for each 256 x 256 of the weights, as long as for 256 rows. "
        "Parts of 128 x 128 spill nothing, in 1.9 times the cycles",
        (0, 0, 616, 0), (0, 0, 425, 0),
    ),
    Bound(
        "grouped_matmul", ".*-bfloat16-bfloat16",
        "the same; parts of 128 columns spill at most 21 and take up to 1.6 times as long",
        (0, 0, 122, 0), (0, 0, 110, 0),
    ),
    Bound(
        "grouped_matmul", ".*-int8-.*",
        "the same, by 128 rows on a v6e, where 256 spill 278 in 38 % fewer cycles. On the older "
        "compiler 128 rows spill 84 on v5e and v5p, where they wait for the matrix unit one after "
        "another; parts of 32 rows spill 0 to 94, in 1.4 times the bundles",
        (84, 84, 93, 0), (0, 0, 8, 0),
    ),
    Bound(
        "page_attention", "decode-32k-mass",
        "as below, and sums of pages are one more product, of float32, beside the softmax",
        (1470, 659, 1958, 2584), (1443, 710, 1967, 2564),
    ),
    Bound(
        "page_attention", "(decode|mixed).*",
        "four heads with 128 rows and 512 keys each, side by side, where prompts are attended: one "
        "fills all 64 registers, spills 50 to 64, and waits for its products and sums 2 (v5e) to 3 "
        "times as long as they take. Spilling adds .3 % to the bundles of a v6e and 3.7 % to a "
        "v5e. Rows that decode, eight heads at once, spill 22 of these",
        (1238, 1186, 1127, 1036), (1100, 1065, 1126, 987),
    ),
    Bound(
        "page_attention", "latent.*",
        "128 heads of 576 lanes share a key: rows, scores and outputs do not fit side by side. By "
        "512 keys instead of 1024, 79 to 419, in 1.1 (v5e) to 1.4 times the cycles",
        (1168, 1179, 833, 397), (1155, 1174, 661, 506),
    ),
    Bound(
        "page_attention", "int8-latent.*",
        "as with latent pages of floats, and keys of eight bits become bfloat16 on their way",
        (1425, 1434, 1275, 969), (1373, 1393, 1415, 1308),
    ),
    Bound(
        "page_attention", "int8-.*",
        "as with pages of floats, and steps of keys and values beside them",
        (1377, 1319, 1434, 1306), (1407, 1311, 1469, 1229),
    ),
    Bound(
        "page_attention", "int4-latent.*",
        "as with eight bits; five parts with steps of their own are five products, not two. "
        "Outputs turn back by 32 rows and a part at a time for nothing; by 128 rows, 115 to 208",
        (2646, 2671, 1974, 1696), (2550, 2600, 1714, 1707),
    ),
    Bound(
        "page_attention", "int4-.*",
        "as with eight bits, in as many bundles",
        (1336, 1342, 1427, 1300), (1299, 1347, 1477, 1222),
    ),
    Bound(
        "flash_attention", ".*",
        "scores of 512 keys by parts of 256 queries, three of which have begun ahead. With one "
        "ahead two thirds as many, in 11 to 25 % more bundles on v6e; tiles of 128 spill 16 to 31 "
        "and take 2.3 (v5e) to 3.4 times (v6e) as many",
        (5450, 5447, 5083, 4780), (5306, 5293, 4959, 4744),
    ),
    Bound(
        "flash_attention_gradient", ".*",
        "both kernels together; parts as in the forward pass, of which one has begun ahead in that "
        "of queries, none in that of keys, which has five products. Parts of 128 spill 382 of the "
        "latter's 3423 on a v5e in 3.5 % more cycles, and take 35 % more on v6e and 7x",
        (5258, 5253, 2274, 1853), (5167, 5174, 1708, 1823),
    ),
)  # fmt: skip


IN_HBM = {("page_write", "decode-256"): 2**18}
"""Bytes of the step's rows, one head behind the other, that libtpu 0.0.50 leaves in the HBM of a
v5p; 0.0.42 had them in VMEM. Over the rule below, and not mended yet."""


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
