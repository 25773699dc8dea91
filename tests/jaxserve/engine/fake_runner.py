"""A device of plain integers, exact enough to tell any wrong page from the right one.

What it keeps for a token is a digest of the token and of what it kept for the one before, read
from the sequence's pages; the next token is drawn from the last digest. So a text comes out right
only if every page on the way held what it should, whatever was copied, shared, evicted or
recomputed.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from jaxserve.cache.page_manager import PageManager
from jaxserve.engine.engine import Engine
from jaxserve.engine.generation import Generation
from jaxserve.engine.programs import Forward
from jaxserve.engine.runner import Launched
from jaxserve.engine.sampler import Sampled
from jaxserve.engine.scheduler import Scheduler, Step
from jaxserve.engine.sequence import Sequence
from jaxserve.request import MAX_LOGPROBS, CompletionOutput, RequestMetrics, SamplingParams

VOCAB = 50
ROOT = b"exact"


def digest(before: int, token: int) -> int:
    return zlib.crc32(token.to_bytes(4, "little"), before)


def next_token(kept: int, seed: int) -> int:
    return digest(kept, 1000 + seed) % VOCAB


def evidence(kept: int) -> float:
    """What a reward head makes of what was kept for a token."""
    return kept % 1000 / 1000 - 0.5


def expected(prompt: list[int], count: int, seed: int = 0) -> list[int]:
    """What a sequence says, alone and without pages."""
    tokens, kept = list(prompt), 0
    for token in prompt:
        kept = digest(kept, token)
    while len(tokens) < len(prompt) + count:
        tokens.append(next_token(kept, seed))
        kept = digest(kept, tokens[-1])
    return tokens[len(prompt) :]


@dataclass(frozen=True)
class FakePlan:
    num_pages: int
    page_size: int
    max_num_seqs: int
    num_ranks: int = 1
    notes_routes: bool = False

    def rows(self, num_tokens: int) -> int:
        return min(num_tokens, self.max_num_seqs)

    @property
    def row_buckets(self) -> tuple[int, ...]:
        return tuple(sorted({1, min(4, self.max_num_seqs), self.max_num_seqs}))


class FakeRunner:
    """Computes a step at once; the engine reads it a step later."""

    num_programs = 0
    reward_head: object = None

    def __init__(self, plan: FakePlan, max_tokens: int, decode_steps: int):
        self.plan, self.decode_steps = plan, decode_steps
        self.limits = max_tokens, plan.rows(max_tokens)
        self.steps: list[Step] = []
        self.fails = False
        self.allocate()

    def allocate(self) -> None:
        self.kv = np.full((self.plan.num_pages, self.plan.page_size), -1, np.int64)
        self._drawn: dict[tuple[int, int], int] = {}  # by slot and position

    def launch(self, steps: list[Step]) -> Launched:
        (step,) = steps
        if self.fails:
            raise RuntimeError("the device is on fire")
        assert len(step.rows) <= self.limits[1]
        assert step.num_tokens == sum(row.count for row in step.rows) <= self.limits[0]
        sources, targets = [a for a, _ in step.copies], [b for _, b in step.copies]
        self.kv[targets] = self.kv[sources]
        written: set[tuple[int, int]] = set()
        drawn = [self._draw(step, repeat, written) for repeat in range(step.repeats)]
        self.steps.append(step)
        kept = [[self._at(r.seq, i) for i in range(r.start, r.start + r.count)] for r in step.rows]
        blank = np.zeros((len(step.rows), MAX_LOGPROBS))
        passes = [r.seq.route.K - 1 if r.samples and r.seq.route else 0 for r in step.rows]
        judged = [evidence(k) for row in kept for k in row] if self.reward_head else None
        return Launched(
            steps=steps,
            sampled=Sampled(np.array(drawn), blank[:, 0], blank[:, 0], blank, blank, blank[:, :4]),
            reports=False,
            observes=False,
            scored=False,
            forward=Forward(None, np.concatenate(kept)[:, None] % 1000, None),
            evidence=judged,  # type: ignore[arg-type]
            passes=np.array(passes) if any(passes) else None,  # type: ignore[arg-type]
        )

    def max_repeats(self, steps: list[Step]) -> int:
        return self.decode_steps

    def _draw(self, step: Step, repeat: int, written: set[tuple[int, int]]) -> list[int]:
        tokens = [self._row(r.seq, r.start + repeat, r.count, written) for r in step.rows]
        for row, token in zip(step.rows, tokens, strict=True):
            if row.samples:
                self._drawn[row.seq.slot, row.start + repeat + row.count] = token
        return tokens

    def _row(self, seq: Sequence, start: int, count: int, written: set[tuple[int, int]]) -> int:
        assert 0 <= seq.slot < self.plan.max_num_seqs
        size = self.plan.page_size
        kept = self._at(seq, start - 1) if start else 0
        for i in range(start, start + count):
            token = seq.tokens[i] if i < len(seq.tokens) else self._drawn[seq.slot, i]
            kept = digest(kept, token)
            place = (seq.pages[i // size], i % size)
            assert place not in written, "two rows write the same place"
            written.add(place)
            self.kv[place] = kept
        return next_token(kept, seq.seed[0])

    def _at(self, seq: Sequence, position: int) -> int:
        size = self.plan.page_size
        return int(self.kv[seq.pages[position // size], position % size])


class Watched(Scheduler):
    """A scheduler whose every step is held against its promises.

    Attributes:
        elsewhere: pages that resting paths own.
    """

    elsewhere: Callable[[], Iterable[int]] = staticmethod(lambda: ())

    def schedule(self, budget: int, max_rows: int | None = None) -> Step:
        decoding = [
            seq
            for seq in self.running
            if seq.length - seq.computed == 1
            and not seq.priority
            and seq.length < seq.max_len
            and all(limit(seq, 1) for limit in seq.limits)
        ]
        step = super().schedule(budget, max_rows)
        riding = {id(row.seq) for row in step.rows}
        left_out = [seq for seq in decoding if id(seq) not in riding and seq.slot >= 0]
        prompts = [row for row in step.rows if row.count > 1]
        assert not (left_out and prompts), "a prompt took the place of a token"
        assert not left_out or min(budget, max_rows or budget) == len(step.rows)
        assert len(riding) == len(step.rows), "a sequence rides once"
        self._check_pages(step)
        return step

    def _check_pages(self, step: Step) -> None:
        size = self.pages.page_size
        owned: dict[int, int] = {}
        for seq in (*self.running, *self.waiting, *self.speculative):
            assert len(set(seq.pages)) == len(seq.pages)
            assert len(seq.pages) >= -(-seq.computed // size)
            for page in seq.pages:
                owned[page] = owned.get(page, 0) + 1
        owned |= dict.fromkeys(self.elsewhere(), 1)
        assert self.pages.num_free + len(owned) == self.pages.num_pages
        written = [
            row.seq.pages[i]
            for row in step.rows
            for i in range(row.start // size, -(-(row.start + row.count) // size))
        ]
        assert len(set(written)) == len(written), "two sequences write the same page"


class Bench:
    """An engine over the fake device, stepped by hand."""

    def __init__(
        self,
        *,
        num_pages: int = 64,
        page_size: int = 4,
        max_num_seqs: int = 8,
        max_tokens: int = 16,
        prefix_caching: bool = True,
        decode_steps: int = 1,
    ):
        plan = FakePlan(num_pages, page_size, max_num_seqs)
        self.runner = FakeRunner(plan, max_tokens, decode_steps)
        self.engine = Engine(self.runner, prefix_caching=prefix_caching)  # type: ignore[arg-type]
        pages = self.engine.ranks[0].pages
        self.engine.ranks = [Watched(pages, max_num_seqs, prefix_caching=prefix_caching)]
        self.max_len = num_pages * page_size
        self._ids = itertools.count()

    def add(
        self,
        prompt: list[int],
        max_tokens: int = 8,
        *,
        n: int = 1,
        seed: int = 0,
        stop_ids: frozenset[int] = frozenset(),
        pooling: str | None = None,
        root: bytes = ROOT,
        request_id: str | None = None,
        matcher: object = None,
    ) -> Generation:
        name = request_id or f"r{next(self._ids)}"
        params = SamplingParams(n=n, max_tokens=max_tokens)
        generation = Generation(name, prompt, n, RequestMetrics(0.0), self.engine.abort)
        last = len(prompt) + (1 if pooling else max_tokens)
        sequences = [
            Sequence(
                tokens=list(prompt),
                prompt_len=len(prompt),
                params=params,
                generation=generation,
                root=root,
                index=i,
                seed=(seed + i, 0),
                max_len=min(last, self.max_len),
                stop_ids=stop_ids,
                pooling=pooling,
                matcher=matcher,
            )
            for i in range(n)
        ]
        self.engine.add(sequences)
        return generation

    def run(self, most: int = 10_000) -> None:
        """Steps until nothing is left to do."""
        for _ in range(most):
            if not self.engine.has_work:
                break
            self.engine.step()
        assert not self.engine.has_work, f"still busy after {most} steps"
        assert self.pages.num_free == self.pages.num_pages, "a page leaked"

    @property
    def pages(self) -> PageManager:
        return self.engine.ranks[0].pages

    def outputs(self, generation: Generation) -> list[CompletionOutput]:
        """What a finished request has said."""
        return generation.result().outputs
