"""What a search may ask of an engine: paths that fork for free, and what is known of each.

A controller sees this module and nothing else of jaxserve, so the same search runs on the engine
(`jaxserve.paths`), on a simulated one (`reasoning.simulated`) or on recorded trees. Specification,
section 3.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Literal, Protocol

from jaxserve.request import RouteNoise


class Prio(IntEnum):
    """Who goes first: speculative rows fill what committed ones leave, and make way for them."""

    COMMIT = 0
    SPEC = 1


@dataclass(frozen=True)
class Gen:
    """How a path is extended.

    Attributes:
        max_tokens: most tokens of this extension.
        stop: tokens that end it, such as the end of a step; they belong to the path.
        topk_logprobs: how many of the likeliest tokens the confidence of a token looks at.
        route: asks for token-level refinement.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[int, ...] = ()
    topk_logprobs: int = 8
    route: RouteNoise | None = None

    def __post_init__(self):
        if self.max_tokens < 1 or self.topk_logprobs < 1:
            raise ValueError(f"{self}: max_tokens and topk_logprobs must be at least 1")
        if not (self.temperature >= 0 and 0 < self.top_p <= 1):
            raise ValueError(f"{self}: temperature is at least 0, top_p above 0 and at most 1")


@dataclass(frozen=True, slots=True)
class Node:
    """A handle on a path: the text from a root to where it was last extended.

    Attributes:
        query: the search that it belongs to.
        path: `(index, at)` of every fork from the root on; `at` is -1 for a fork at the end. Random
            numbers of its tokens follow from it, from their positions and from the query's seed, so
            a child is a function of its prefix, its index and the seed, whenever it is made.
    """

    query: int
    path: tuple[tuple[int, int], ...] = ()
    _hash: int = field(init=False, repr=False, compare=False)
    _forks: dict[tuple[int, int], Node] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.query, self.path)))
        object.__setattr__(self, "_forks", {})

    def __hash__(self) -> int:
        """Known beforehand: searches look nodes up all the time."""
        return self._hash

    def fork(self, index: int, at: int = -1) -> Node:
        """The handle of a fork: the same object each time, which is quicker to find than an equal
        one."""
        found = self._forks.get((index, at))
        if found is None:
            found = self._forks[index, at] = Node(self.query, (*self.path, (index, at)))
        return found

    @property
    def depth(self) -> int:
        return len(self.path)


@dataclass(frozen=True, slots=True)
class Step:
    """What one extension added to a path.

    Attributes:
        reason: "stop": a token of `Gen.stop`; "end": the end of the text; "length": `max_tokens`,
            or the context is full.
        logprobs: of the tokens, under the model as it is.
        entropies: of their distributions, in nats.
        margins: between the likeliest token's log-probability and the next one's.
        confidences: mean negative log-probability of the likeliest k tokens (section 2.2): large
            where the distribution is peaked.
        passes: over the model, beyond one for each token.

    Of a token that was refined, all four are of the mixed distribution that it was drawn from.
    """

    tokens: tuple[int, ...]
    reason: Literal["stop", "end", "length"]
    logprobs: tuple[float, ...] = ()
    entropies: tuple[float, ...] = ()
    margins: tuple[float, ...] = ()
    confidences: tuple[float, ...] = ()
    passes: int = 0


@dataclass(frozen=True, slots=True)
class PathStats:
    """All that is known of a path; means are over its own tokens, without the prompt.

    Attributes:
        tokens: generated so far, all forks included.
        logprob: their sum of log-probabilities.
        logprobs, entropies, margins, confidences: token by token, as in `Step`.
        scores: what scorers have said of it, by scorer, latest last.
        finished: its text has ended.
        route_sketch: experts that were asked while each token was drawn, as bit masks [tokens,
            layers], expert e at bit e mod 32; None where nobody takes note of them.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...] = ()
    entropies: tuple[float, ...] = ()
    margins: tuple[float, ...] = ()
    confidences: tuple[float, ...] = ()
    scores: dict[str, float] | None = None
    finished: bool = False
    route_sketch: Any = None

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    @property
    def logprob(self) -> float:
        return sum(self.logprobs)

    @property
    def entropy(self) -> float:
        return _mean(self.entropies)

    @property
    def margin(self) -> float:
        return _mean(self.margins)

    def conf_group(self, window: int) -> float:
        """Mean confidence of the last `window` tokens."""
        return _mean(self.confidences[-window:])

    def conf_min(self, window: int) -> float:
        """Least mean confidence of any `window` tokens in a row (DeepConf; Fu et al., 2025)."""
        c = self.confidences
        return min(_mean(c[i : i + window]) for i in range(max(len(c) - window, 0) + 1))


@dataclass
class Ledger:
    """Where the tokens of a query went. `generated == committed + spec_waste`, always.

    Attributes:
        committed: tokens that the search used, `spec_hit` of which were made ahead of time.
        spec_waste: made ahead of time and thrown away, or still waiting to be used or not.
        effective: passes over the model beyond one for each token: K routings of a token add K - 1,
            where the gate lets it in; a token that it keeps out has one pass and adds nothing.
        prefill: prompt tokens computed, those of probes among them.
        scorer: tokens that scorers have read or written.
        calls: extensions begun.
        critical_steps: model calls in a row that no search could have made side by side; kept by
            simulated pools, whose clock knows it.
        peak_pages: most pages held at a time.
    """

    committed: int = 0
    spec_hit: int = 0
    spec_waste: int = 0
    effective: int = 0
    prefill: int = 0
    scorer: int = 0
    calls: int = 0
    critical_steps: float = 0.0
    peak_pages: int = 0

    @property
    def generated(self) -> int:
        return self.committed + self.spec_waste

    @property
    def waste_ratio(self) -> float:
        return self.spec_waste / max(self.committed, 1)


@dataclass(frozen=True)
class Capacity:
    """What is free just now.

    Attributes:
        free_rows: rows that the next step's program would otherwise pad.
        ridge: rows at which a step begins to take longer with each.
        live_rows: rows that run.
        free_pages: pages that nobody holds.
        doubles: so many rows take a step twice as long as it would take without any, as measured;
            None: not known yet.
        step: seconds of a step, likewise.
    """

    free_rows: int
    ridge: int
    live_rows: int
    free_pages: int
    doubles: float | None = None
    step: float | None = None


@dataclass(frozen=True)
class StepDone:
    """An extension has ended."""

    node: Node
    step: Step


@dataclass(frozen=True)
class Scored:
    """A scorer has spoken."""

    node: Node
    scorer: str
    value: float


@dataclass(frozen=True)
class Failed:
    """An extension, a score or a probe cannot be had; `Cancelled` if the search gave it up."""

    node: Node
    error: Exception


Event = StepDone | Scored | Failed


class SearchError(Exception):
    """A search did what it may not; its own query ends with this, and no other."""


class DeadPathError(SearchError):
    """An action for a path that was cancelled or released, or that never was."""


class Cancelled(SearchError):
    """The path was cancelled while this was on its way."""


class PathPool(Protocol):
    """Paths of all searches on one engine. Every method returns at once; one event loop owns it.

    Errors surface where a result is awaited: `DeadPathError` for paths that are gone, `Cancelled`
    for those that are given up meanwhile; nothing hangs.
    """

    def root(self, prompt: Sequence[int], *, query: int, seed: int) -> Node:
        """Begins a query."""
        ...

    def fork(self, parent: Node, index: int, *, at: int | None = None) -> Node:
        """A path that begins with the parent's tokens, or with the first `at` generated ones.

        The same arguments give the same node; nothing is computed or copied.
        """
        ...

    def extend(self, n: Node, g: Gen, *, prio: Prio = Prio.COMMIT) -> Awaitable[Step]:
        """Generates the path's next tokens. One extension of a path runs at a time.

        What is awaited also arrives as an event.
        """
        ...

    def score(self, n: Node, *, scorer: str = "prm", prio: Prio = Prio.COMMIT) -> Awaitable[float]:
        """What a scorer thinks of the path as it is, in [0, 1]; also an event."""
        ...

    def probe(self, n: Node, suffix: Sequence[int], max_tokens: int) -> Awaitable[Step]:
        """What the path would say behind a suffix, greedily, on a fork that is thrown away."""
        ...

    def promote(self, n: Node) -> None:
        """A speculative path is wanted after all: what it has made counts, and nothing starts
        again."""
        ...

    def cancel(self, n: Node, *, subtree: bool = True) -> None:
        """Ends what runs of a path, and of those forked from it, at the next step."""
        ...

    def release(self, n: Node) -> None:
        """Gives a path's pages back; its statistics stay. Paths forked from it live on."""
        ...

    def close(self, query: int) -> Ledger:
        """Ends a query: all its paths are cancelled and released. Safe to call twice."""
        ...

    def stats(self, n: Node) -> PathStats: ...

    def events(self, query: int) -> AsyncIterator[Event]:
        """What happens to a query's paths, in the order in which it does, until `close`."""
        ...

    def capacity(self) -> Capacity: ...

    def ledger(self, query: int) -> Ledger:
        """A snapshot."""
        ...


@dataclass(frozen=True)
class Question:
    """What a search is to answer.

    Attributes:
        prompt: token ids.
        read: the answer that a path's generated tokens come to, or None; equal answers are one.
        step: tokens that close a step.
        max_tokens: most tokens of a path.
        seed: of all random numbers of the search.
        text: how tokens read, for whoever looks at the result.
        state: the tokens at the end of a path's closed steps that all later ones depend on, as the
            numbers that are still to be multiplied; paths in equal states go on alike. None where a
            task has nothing of the kind.
    """

    prompt: tuple[int, ...]
    read: Callable[[Sequence[int]], Hashable | None]
    step: tuple[int, ...] = ()
    max_tokens: int = 1024
    seed: int = 0
    text: Callable[[Sequence[int]], str] | None = None
    state: Callable[[Sequence[int]], tuple[int, ...] | None] | None = None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
