"""One decoding row: its tokens, its pages, and how far it has been computed."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass, field
from typing import Any, Protocol

from jaxserve.engine.generation import Generation
from jaxserve.request import RouteNoise, SamplingParams


class Rest(Protocol):
    """Where a sequence's pages go when it is over, and who looks at what it computes."""

    def take(self, seq: Sequence) -> None:
        """Takes over `seq.pages`, which the scheduler would give back."""
        ...

    def see(self, start: int, evidence: Sequence_[float]) -> None:
        """Is told what each token from `start` on adds to the log-odds of a reward head."""
        ...


@dataclass(eq=False)
class Sequence:
    """Mutable; owned by the scheduler.

    Attributes:
        tokens: prompt and output, as far as the host has read it.
        prompt_len: how many of them the user sent.
        generation: where its output goes.
        index: which of the request's completions it is.
        seed: of its own random numbers, together with the position of each token.
        computed: tokens whose keys are in pages, or will be once all launched steps have run.
        in_flight: tokens sampled by launched steps that the host has not read.
        pages: in order; `published` of them are in the prefix index, `keys` being their keys.
        rank: of the data-parallel replica that serves it: the owner of its pages and its slot.
        slot: its row in the device's per-sequence state; -1 while it waits. `stay` counts moves.
        stop_ids: tokens that end it.
        pooling: "last" or "mean" for an embedding, which samples nothing.
        reads: it computes the tokens it has, and draws none.
        priority: 0, or 1 for speculation: rows that fill what others leave (`Scheduler`).
        rest: of a search's path; pages it brings along are its own before it is begun.
        judged: a reward head looks at its tokens.
        observed: of each drawn token, what `sampler.observe` says; None: nobody asks.
        routes: likewise, the experts that were asked in each layer, as bits.
        confidence_k: how many of the likeliest tokens the confidence looks at.
        route: how its tokens are refined, if they are; `passes` beyond the plain ones were run for
            those that it has drawn.
    """

    tokens: list[int]
    prompt_len: int
    params: SamplingParams
    generation: Generation
    root: bytes
    index: int = 0
    seed: tuple[int, int] = (0, 0)
    max_len: int = 0
    computed: int = 0
    in_flight: int = 0
    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    published: int = 0
    rank: int = 0
    slot: int = -1
    stay: int = 0
    stop_ids: frozenset[int] = frozenset()
    finished: bool = False
    pooling: str | None = None
    limits: tuple[Callable[[Sequence, int], int], ...] = ()  # of features that concern it
    siblings: list[Sequence] = field(default_factory=list)  # fork from this one after its prompt
    matcher: Any = None
    text: Any = None
    cumulative_logprob: float = 0.0
    pooled: Any = None
    reads: bool = False
    priority: int = 0
    rest: Rest | None = None
    judged: bool = False
    observed: list[list[float]] | None = None
    routes: list[list[int]] | None = None
    confidence_k: int = 1
    route: RouteNoise | None = None
    passes: int = 0

    @property
    def length(self) -> int:
        """Tokens read or on their way."""
        return len(self.tokens) + self.in_flight

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def begun(self) -> bool:
        """Whether some token of its request has been scheduled."""
        return self.generation.metrics.first_scheduled_time is not None

    @property
    def samples(self) -> bool:
        return self.pooling is None and not self.reads

    @property
    def uses_cache(self) -> bool:
        """Whether it may skip a cached prompt: not if every token's own row is asked for."""
        every = self.params.prompt_logprobs is not None or self.pooling == "mean" or self.reads
        return not every
