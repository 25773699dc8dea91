"""What is known of a path, and how it grows: plain values, of no thread."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from jaxserve.paths.keeper import Extension
from jaxserve.protocol import Gen, Ledger, PathStats, Prio, SearchError, Step


def spend(ledger: Ledger, prio: Prio, count: int) -> None:
    """Enters tokens that were drawn."""
    if prio is Prio.SPEC:
        ledger.spec_waste += count
    else:
        ledger.committed += count


def step_of(end: Extension, g: Gen, eos_ids: frozenset[int]) -> Step:
    last = end.tokens[-1] if end.tokens else None
    reason = "end" if last in eos_ids else "stop" if last in g.stop else "length"
    return Step(tuple(end.tokens), reason, *columns(end), passes=end.passes)


def columns(end: Extension) -> tuple[tuple[float, ...], ...]:
    """Log-probabilities, entropies, margins and confidences."""
    return tuple(zip(*end.stats, strict=True)) if end.stats else ((), (), (), ())


def longer(known: PathStats, end: Extension, eos_ids: frozenset[int]) -> PathStats:
    if not end.tokens:
        return known
    logprobs, entropies, margins, confidences = columns(end)
    return replace(
        known,
        tokens=(*known.tokens, *end.tokens),
        logprobs=(*known.logprobs, *logprobs),
        entropies=(*known.entropies, *entropies),
        margins=(*known.margins, *margins),
        confidences=(*known.confidences, *confidences),
        finished=end.tokens[-1] in eos_ids,
        scores=None,
        route_sketch=(*(known.route_sketch or ()), *end.routes) if end.routes else None,
    )


def first(known: PathStats, count: int) -> PathStats:
    """Of the first tokens of a path.

    Raises:
        SearchError: it has fewer.
    """
    if not 0 <= count <= known.n_tokens:
        raise SearchError(f"at={count} must be within the {known.n_tokens} tokens of the path")
    if count == known.n_tokens:
        return known
    return PathStats(
        known.tokens[:count], known.logprobs[:count], known.entropies[:count],
        known.margins[:count], known.confidences[:count],
        route_sketch=known.route_sketch and known.route_sketch[:count],
    )  # fmt: skip


def words_of(seed: int, path: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """Two 32-bit words for the random numbers of a path."""
    digest = hashlib.blake2b(repr((seed, path)).encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
