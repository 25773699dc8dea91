"""Rows of a step that begin with the same pages stand side by side: kernels read those once."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np

from jaxserve.engine.scheduler import Group, Row, Step
from jaxserve.engine.sequence import Sequence
from jaxserve.plan import Plan


class Grouping:
    """Finds the groups of each step, and keeps them while the same sequences decode."""

    def __init__(self, plan: Plan, tables: np.ndarray):
        """
        Args:
            tables: [max_num_seqs, pages_per_seq], pages of the sequence in each slot; kept up by
                others.
        """
        self._tables = tables
        self._pages = plan.group_pages
        self._keys = plan.group_pages * plan.page_size
        self._decoding: list[Sequence] = []
        self._order: list[int] = []
        self._groups: list[Group] = []

    def arrange(self, step: Step, moved_in: bool) -> None:
        """Puts the rows of a step in order, the groups first, and names the groups.

        What decoding sequences have in common lies before all that they write, so it stays as it
        is until another sequence joins them or one of them moves.

        Args:
            moved_in: whether some row's sequence is new in its slot.
        """
        rows, seqs = step.rows, [row.seq for row in step.rows]
        decoding = step.num_tokens == len(rows)
        if moved_in or not decoding or seqs != self._decoding:
            self._order, self._groups = self._find(rows)
            self._decoding = seqs if decoding else []
        step.groups = self._groups
        if self._groups:
            step.rows = [rows[i] for i in self._order]

    def _find(self, rows: list[Row]) -> tuple[list[int], list[Group]]:
        """The order of a step's rows, and the groups in it."""
        whole = [row.start // self._keys for row in rows]  # blocks that this step does not write
        begins = Counter(row.seq.pages[0] for row, n in zip(rows, whole, strict=True) if n)
        alike = [i for i, n in enumerate(whole) if n and begins[rows[i].seq.pages[0]] > 1]
        if not alike:
            return [], []
        width = max(whole[i] for i in alike) * self._pages
        tables = self._tables[[rows[i].seq.slot for i in alike], :width]
        heads = [t[: whole[i] * self._pages].tobytes() for i, t in zip(alike, tables, strict=True)]
        by_head = sorted(range(len(alike)), key=heads.__getitem__)  # equal beginnings, neighbours
        alike = [alike[j] for j in by_head]
        blocks = tables[by_head].reshape(len(alike), -1, self._pages)
        equal = np.logical_and.accumulate((blocks[1:] == blocks[:-1]).all(2), 1).sum(1)
        common = [
            min(n, whole[i], whole[j])
            for n, (i, j) in zip(equal.tolist(), pairwise(alike), strict=True)
        ]
        order, groups = list[int](), list[Group]()
        for first, end, n in _best(common, 0, len(alike))[1]:
            members = sorted(alike[first:end])
            groups.append(Group(len(order), len(order) + len(members), n * self._pages))
            order += members
        return order + sorted({*range(len(rows))} - {*order}), groups


def _best(common: list[int], first: int, end: int) -> tuple[int, list[Group]]:
    """How many blocks need not be read again, at most, and the groups of rows that save them.

    Groups do not overlap, so rows that have much in common may be better off apart from those that
    share less of it.

    Args:
        common: blocks that each row shares with the next one.
        first, end: the rows in question.
    """
    between = common[first : end - 1]
    if not between:
        return 0, []
    least = min(between)
    cuts = [i for i, n in enumerate(between, first + 1) if n == least]
    parts = [_best(common, a, b) for a, b in pairwise([first, *cuts, end])]
    apart = sum(saved for saved, _ in parts)
    if apart > (together := least * len(between)) or not together:
        return apart, [group for _, groups in parts for group in groups]
    return together, [Group(first, end, least)]
