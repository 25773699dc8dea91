"""What is known of a path, and how it grows: plain values, of no thread."""

from __future__ import annotations

import hashlib

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
    columns = zip(*end.stats, strict=True) if end.stats else ()
    return Step(tuple(end.tokens), reason, *columns, passes=end.passes)


def longer(known: PathStats, step: Step, routes: tuple[tuple[int, ...], ...] = ()) -> PathStats:
    """Of a path, once it has gone on by a step; `routes` are of its tokens, if they are noted."""
    if not step.tokens:
        return known
    return PathStats(
        known.tokens + step.tokens,
        known.logprobs + step.logprobs,
        known.entropies + step.entropies,
        known.margins + step.margins,
        known.confidences + step.confidences,
        None,
        step.reason == "end",
        (*(known.route_sketch or ()), *routes) if routes else None,
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
