"""Texts that say nearly the same: average linkage over the cosine distance of their words."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise


def words(tokens: Sequence[int]) -> Counter[tuple[int, ...]]:
    """A text as a vector: how often each token, and each pair of neighbours, is in it."""
    return Counter([*((token,) for token in tokens), *pairwise(tokens)])


def distance(a: Mapping[tuple[int, ...], int], b: Mapping[tuple[int, ...], int]) -> float:
    """One less the cosine; texts without any token are like each other only."""
    if not a or not b:
        return float(bool(a) != bool(b))
    dot = sum(count * b.get(word, 0) for word, count in a.items())
    return 1 - dot / math.sqrt(_square(a) * _square(b))


def _square(a: Mapping[tuple[int, ...], int]) -> float:
    return float(sum(count * count for count in a.values()))


def clusters(texts: Sequence[Sequence[int]], cut: float) -> list[int]:
    """The cluster of each text, numbered in the order in which they first appear.

    The two clusters whose texts are nearest on average become one, until no two are within `cut`.
    """
    vectors = [words(text) for text in texts]
    groups = {i: [i] for i in range(len(texts))}
    apart = {(i, j): distance(vectors[i], vectors[j]) for j in groups for i in range(j)}
    while apart:
        i, j = min(apart, key=lambda pair: (apart[pair], pair))
        if apart[i, j] > cut:
            break
        n, m = len(groups[i]), len(groups[j])
        for k in groups:
            if k not in (i, j):
                one, two = (min(i, k), max(i, k)), (min(j, k), max(j, k))
                apart[one] = (n * apart[one] + m * apart.pop(two)) / (n + m)
        groups[i] += groups.pop(j)
        del apart[i, j]
    found = [0] * len(texts)
    for number, members in enumerate(sorted(groups.values(), key=min)):
        for i in members:
            found[i] = number
    return found
