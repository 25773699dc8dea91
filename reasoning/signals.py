"""What a pool's controller goes by: agreement, likeness and confidence (specification, 2.2).

All are plain arithmetic on what the engine reports of each token; nothing here draws or learns.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations, islice
from typing import Any

from jaxserve.protocol import PathStats


def agreement(totals: Mapping[Hashable, float]) -> float:
    """The leading answer's share of all weight; 0 before there is an answer."""
    whole = sum(totals.values())
    return max(totals.values()) / whole if whole else 0.0


def groups(confidences: Sequence[float], window: int) -> Sequence[float]:
    """Mean confidence of every `window` tokens in a row; of all, where there are fewer."""
    if window == 1 or not confidences:
        return confidences
    n = min(window, len(confidences))
    whole = sum(confidences[:n])
    means = [whole / n]
    for left, right in zip(confidences, confidences[n:], strict=False):
        whole += right - left
        means.append(whole / n)
    return means


def least_group(stats: PathStats, window: int) -> float:
    """A path's weakest moment; infinite before its first token, so that nobody stops it for it."""
    return min(groups(stats.confidences, window), default=math.inf)


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of them lie, interpolated."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation, of all there is; zeros for none."""
    if not values:
        return 0.0, 0.0
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in values) / len(values))


def spikes(entropies: Sequence[float], gate: float) -> float:
    """The share of tokens whose distribution has more than `gate` nats."""
    return sum(e > gate for e in entropies) / len(entropies) if entropies else 0.0


def redundancy(paths: Sequence[PathStats], window: int, n: int = 3, most: int = 32) -> float:
    """Mean likeness of all pairs, from 0 to 1; 0 for fewer than two paths.

    Of a large pool it is that of `most` pairs or fewer, at even distances among all: pairs grow
    with the square of the pool, and a round has no time for them.
    """
    if len(paths) < 2:
        return 0.0
    some = islice(combinations(paths, 2), None, None, -(-math.comb(len(paths), 2) // most))
    return statistics.fmean([likeness(a, b, window, n) for a, b in some])


def likeness(a: PathStats, b: PathStats, window: int, n: int = 3) -> float:
    """How alike the last `window` tokens of two paths are, in [0, 1].

    Half of it is the Jaccard index of their n-grams and half that of the experts they used, layer
    by layer; n-grams alone where nobody has taken note of experts.
    """
    text = jaccard(n_grams(a.tokens[-window:], n), n_grams(b.tokens[-window:], n))
    if a.route_sketch is None or b.route_sketch is None:
        return text
    ours, theirs = experts(a.route_sketch[-window:]), experts(b.route_sketch[-window:])
    layers = [_overlap(x, y) for x, y in zip(ours, theirs, strict=True)]
    return 0.5 * text + 0.5 * statistics.fmean(layers) if layers else text


def n_grams(tokens: Sequence[int], n: int) -> set[tuple[int, ...]]:
    """Runs of n tokens; the whole, where it is shorter."""
    if len(tokens) <= n:
        return {tuple(tokens)} if tokens else set()
    return set(zip(*(tokens[i:] for i in range(n)), strict=False))


def jaccard(a: set[Any], b: set[Any]) -> float:
    """Share of what either has that both have; 1 for two empty sets."""
    return len(a & b) / len(a | b) if a or b else 1.0


def experts(sketch: Any) -> list[int]:
    """Bit masks of the experts used in each layer by any of the tokens [tokens, layers]."""
    masks = list[int]()
    for row in sketch:
        bits = [int(mask) for mask in row]
        masks = [x | y for x, y in zip(masks, bits, strict=True)] if masks else bits
    return masks


def _overlap(a: int, b: int) -> float:
    return (a & b).bit_count() / (a | b).bit_count() if a | b else 1.0
