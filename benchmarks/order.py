"""Which cases are run, and which come first: time may end before all have had their turn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from kernels_pallas.op import Case, Op
from kernels_pallas.registry import OPS

Work = Sequence[tuple[Op, Case]]

GOALS = (
    ("page_attention", "decode-32k"),
    ("flash_attention", "4k"),
    ("int8_matmul", "7168x4096x4096-bfloat16"),
    ("grouped_matmul", "16384x128x1536x2048-L2-int8-bfloat16"),
    ("page_attention", "latent-decode-8k"),
    ("page_attention", "latent-decode-8k-16-heads"),
    ("page_attention", "decode-32k-8-to-1"),
    ("page_attention", "int8-latent-decode-8k"),
    ("page_attention", "int8-latent-decode-8k-16-heads"),
    ("int8_matmul", "2048x14336x4096-L4-silu-bfloat16"),
    ("grouped_matmul", "4096x8x4096x7168-L2-int8-bfloat16"),
    ("page_write", "int8-decode-128"),
)
"""What a card is asked first: a case of each claim about speed."""


def wanted(ops: Sequence[str], cases: Sequence[str], *, shipped: bool) -> Work:
    """What is asked for by names of ops and parts of names of cases, in the order of a run.

    Raises:
        ValueError: nothing has such a name; it says what has one.
    """
    known = [op.name for op in OPS]
    if unknown := [op for op in ops if op not in known]:
        raise ValueError(f"no op is called {', '.join(unknown)}; there are {', '.join(known)}")
    work = goals_first(in_turns(list(chosen(ops, cases, shipped))))
    if not work:
        there = ", ".join(case.name for _, case in chosen(ops, [], shipped))
        raise ValueError(f"no case's name contains {' or '.join(cases)}; there are {there}")
    return work


def chosen(ops: Sequence[str], cases: Sequence[str], shipped: bool) -> Iterator[tuple[Op, Case]]:
    """Cases whose names contain one of the words given, of ops of those names."""
    for op in OPS:
        for case in op.cases:
            named = not cases or any(word in case.name for word in cases)
            if case.shipped == shipped and named and (not ops or op.name in ops):
                yield op, case


def bodies_on(op: Op, case: Case, platform: str) -> list[str]:
    """Names of the bodies for a platform that take a case."""
    return [
        name
        for name, body in op.bodies.items()
        if body.platform == platform and (case.bodies is None or name in case.bodies)
    ]


def in_turns(work: Work) -> list[tuple[Op, Case]]:
    """The first case of each op, then the second of each: a run that ends early has met all ops."""
    met, turns = Counter[str](), list[int]()
    for op, _ in work:
        turns.append(met[op.name])
        met[op.name] += 1
    return [work[i] for i in sorted(range(len(work)), key=turns.__getitem__)]


def goals_first(work: Work) -> list[tuple[Op, Case]]:
    """What is asked first in the order of `GOALS`, and then the rest as it stands."""
    rank = {goal: i for i, goal in enumerate(GOALS)}
    return sorted(work, key=lambda pair: rank.get((pair[0].name, pair[1].name), len(GOALS)))
