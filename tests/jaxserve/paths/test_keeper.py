"""Paths on the fake device, whose texts come out right only if every page held what it should."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from random import Random
from typing import Any

import pytest

from jaxserve.paths.keeper import Extension, Keeper, Path
from jaxserve.protocol import Gen, RouteNoise
from tests.jaxserve.engine.fake_runner import Bench, digest, evidence, expected

PROMPT = [3, 1, 4, 1, 5, 9, 2]


@dataclass
class Known:
    """A path as the test knows it."""

    path: Path
    tokens: list[int]
    seed: int
    running: bool = False
    dead: bool = False
    scores: list[Any] = field(default_factory=list[Any])


class Rig:
    """A keeper on a bench, and what its paths should say."""

    def __init__(self, **bench: Any):
        self.bench = Bench(**bench)
        self.bench.runner.reward_head = object()
        self.engine = self.bench.engine
        self.keeper = Keeper(self.engine, b"exact", self.bench.max_len)
        self.known: list[Known] = []
        self.engine.ranks[0].elsewhere = self._resting_pages  # type: ignore[attr-defined]
        self.counts: Counter[str] = Counter()
        self.broken = False

    def _resting_pages(self) -> Iterator[int]:
        return chain.from_iterable(k.path.pages for k in self.known)

    def root(self, prompt: list[int]) -> Known:
        path = self.keeper.new_root(list(prompt))
        self.keeper.read_root(path)
        return self._know(path, list(prompt))

    def fork(self, parent: Known, at: int | None = None) -> Known:
        at = len(parent.tokens) if at is None else at
        return self._know(self.keeper.fork(parent.path, at), parent.tokens[:at])

    def _know(self, path: Path, tokens: list[int]) -> Known:
        self.known.append(Known(path, tokens, seed=len(self.known) * 7))
        return self.known[-1]

    def extend(
        self, known: Known, count: int, *, priority: int = 0, stop: frozenset[int] = frozenset(),
        route: RouteNoise | None = None,
    ) -> list[Extension]:  # fmt: skip
        ends: list[Extension] = []
        known.running = True
        g = Gen(count, route=route)
        done = partial(self._done, known, g, stop, ends)
        seed = (known.seed, 0)
        self.keeper.extend(known.path, g, seed, stop, priority, (), done)
        return ends

    def _done(
        self, known: Known, g: Gen, stop: frozenset[int], ends: list[Extension], end: Extension
    ) -> None:
        ends.append(end)
        count = g.max_tokens
        assert end.passes == (g.route.K - 1 if g.route else 0) * len(end.tokens)
        known.running = False
        self.counts["tokens"] += len(end.tokens)
        assert end.tokens == expected(known.tokens, len(end.tokens), known.seed)
        assert len(end.tokens) == len(end.stats) or not end.stats
        assert not stop.intersection(end.tokens[:-1])
        assert end.error is None or known.dead or self.broken
        if end.error is None and not known.dead:
            full = len(known.tokens) + len(end.tokens) == self.keeper.max_model_len
            assert len(end.tokens) == count or full or end.tokens[-1] in stop
        known.tokens = known.tokens + end.tokens

    def score(self, known: Known) -> None:
        tokens = list(known.tokens)

        def answer(value: float | Exception) -> None:
            known.scores.append(value)
            if isinstance(value, Exception):
                assert known.dead or self.broken, value
                return
            assert value == pytest.approx(log_odds(tokens))

        self.keeper.score(known.path, answer)

    def cancel(self, known: Known) -> None:
        known.dead = True
        self.keeper.cancel(known.path)

    def run(self) -> None:
        while self.engine.has_work:
            self.engine.step()

    def end(self) -> None:
        """Everything is given back, and nothing has leaked."""
        for known in self.known:
            self.keeper.release(known.path)
        self.run()
        assert self.bench.pages.num_free == self.bench.pages.num_pages
        assert not any(known.running for known in self.known)


def log_odds(tokens: list[int]) -> float:
    kept, total = 0, 0.0
    for token in tokens:
        kept = digest(kept, token)
        total += evidence(kept)
    return total


def test_forks_go_on_where_their_parent_is():
    rig = Rig()
    root = rig.root(PROMPT)
    children = [rig.fork(root) for _ in range(5)]
    for child in children:
        rig.extend(child, 6)
    rig.run()
    grandchildren = [rig.fork(child) for child in children for _ in range(2)]
    for path in grandchildren:
        rig.extend(path, 3)
    rig.run()
    assert all(len(path.tokens) == len(PROMPT) + 9 for path in grandchildren)
    rig.end()


def test_a_prompt_is_computed_once_for_all_its_forks():
    rig = Rig(max_num_seqs=8)
    root = rig.root(PROMPT)
    for _ in range(8):
        rig.extend(rig.fork(root), 1)
    rig.run()
    rows = [row for step in rig.bench.runner.steps for row in step.rows]
    assert sum(row.count for row in rows) <= len(PROMPT) - 1 + 8 * 2  # one wasted row each, at most
    rig.end()


def test_a_text_does_not_depend_on_how_it_is_cut():
    def text(counts: list[int]) -> list[int]:
        rig = Rig()
        path = rig.fork(rig.root(PROMPT))
        for count in counts:
            rig.extend(path, count)
            rig.run()
        rig.end()
        return path.tokens

    assert text([12]) == text([1] * 12) == text([5, 4, 3])


def test_a_fork_within_a_path_that_runs():
    rig = Rig()
    path = rig.fork(rig.root(PROMPT))
    rig.extend(path, 20)
    for _ in range(12):
        rig.engine.step()
    early = rig.fork(path, len(PROMPT) + 0)
    assert path.path.tokens is not None
    later = rig._know(rig.keeper.fork(path.path, len(PROMPT) + 3), path.path.tokens[:10])
    rig.extend(early, 5)
    rig.extend(later, 5)
    rig.run()
    rig.end()


def test_an_extension_ends_at_a_stop_token():
    rig = Rig()
    path = rig.fork(rig.root(PROMPT))
    text = expected(PROMPT, 12, path.seed)
    rig.extend(path, 12, stop=frozenset({text[4]}))
    rig.run()
    assert path.tokens == PROMPT + text[: text.index(text[4]) + 1]
    rig.end()


def test_speculation_fills_rows_and_makes_way():
    rig = Rig(max_num_seqs=4, num_pages=64)
    root = rig.root(PROMPT)
    rig.run()
    guesses = [rig.fork(root) for _ in range(4)]
    for guess in guesses:
        rig.extend(guess, 8, priority=1)
    for _ in range(3):
        rig.engine.step()
    wanted = [rig.fork(root) for _ in range(4)]
    for path in wanted:
        rig.extend(path, 4)
    rig.engine.step()
    assert {row.seq.priority for row in rig.bench.runner.steps[-1].rows} == {0}
    rig.run()
    assert all(len(path.tokens) == len(PROMPT) + 8 for path in guesses)  # they went on later
    rows = [row for step in rig.bench.runner.steps for row in step.rows]
    drawn = sum(row.samples for row in rows)
    assert drawn <= 4 * 8 + 4 * 4 + 8 + 4  # parked paths computed nothing again
    rig.end()


def test_a_promoted_path_goes_on_where_it_is():
    rig = Rig(max_num_seqs=2, num_pages=64)
    root = rig.root(PROMPT)
    rig.run()
    guess, other = rig.fork(root), rig.fork(root)
    rig.extend(guess, 8, priority=1)
    for _ in range(4):
        rig.engine.step()
    assert guess.path.seq is not None
    before = len(guess.path.seq.tokens)
    rig.keeper.promote(guess.path)
    for path in (other, rig.fork(root)):
        rig.extend(path, 4)
    rig.engine.step()
    assert guess.path.seq in rig.engine.ranks[0].running and before > len(PROMPT)
    rig.run()
    starts = [row.start for s in rig.bench.runner.steps for row in s.rows if row.seq.seed[0] == 7]
    assert starts == sorted(set(starts)), "nothing was computed twice"
    rig.end()


def test_a_ridge_bounds_speculation():
    rig = Rig(max_num_seqs=8, num_pages=64)
    root = rig.root(PROMPT)
    rig.run()
    rig.engine.ranks[0].ridge = 2
    for _ in range(6):
        rig.extend(rig.fork(root), 5, priority=1)
    rig.run()
    assert max(len(step.rows) for step in rig.bench.runner.steps) == 2
    rig.end()


def test_resting_pages_are_given_back_when_others_need_them():
    rig = Rig(num_pages=12, page_size=4, max_num_seqs=4)
    root = rig.root(PROMPT)
    resting = [rig.fork(root) for _ in range(4)]
    for path in resting:
        rig.extend(path, 6)
        rig.run()
    for path in resting[::-1]:
        rig.extend(path, 6)
    rig.run()
    assert all(len(path.tokens) == len(PROMPT) + 12 for path in resting)
    rig.end()


def test_scores_follow_from_every_token():
    rig = Rig()
    root = rig.root(PROMPT)
    paths = [rig.fork(root) for _ in range(3)]
    for path in paths:
        rig.score(path)  # the prompt alone
        rig.extend(path, 4)
    rig.run()
    for path in paths:
        rig.score(path)
        assert path.path.seq is None or path.path.seq.reads
    rig.run()
    assert [len(path.scores) for path in paths] == [2, 2, 2]
    rig.end()


def test_a_failed_step_ends_what_ran_and_nothing_else():
    rig = Rig()
    root = rig.root(PROMPT)
    path, other = rig.fork(root), rig.fork(root)
    rig.extend(path, 4)
    rig.run()
    ends = rig.extend(other, 9)
    rig.score(path)
    rig.bench.runner.fails = rig.broken = True
    with pytest.raises(RuntimeError):
        rig.engine.step()
    rig.bench.runner.fails = rig.broken = False
    assert ends[0].error is not None and isinstance(path.scores[0], Exception)
    rig.score(path)
    rig.extend(other, 2)
    rig.run()
    assert isinstance(path.scores[1], float)
    rig.end()


def test_a_path_that_is_gone_says_so():
    rig = Rig()
    path = rig.fork(rig.root(PROMPT))
    rig.cancel(path)
    ends = rig.extend(path, 4)
    rig.run()
    (end,) = ends
    assert "gone" in str(end.error)
    rig.end()


@pytest.mark.parametrize("seed", range(8))
def test_no_page_leaks_whatever_happens(seed: int):
    """1,250 operations each, on a cache that is too small for all that is asked."""
    rng = Random(seed)
    rig = Rig(num_pages=rng.choice([24, 40]), page_size=rng.choice([2, 4]), max_num_seqs=6)
    fuzz(rig, rng, 1250)
    rig.end()
    assert rig.counts["tokens"] > 500


VERBS = {
    "extend": 6, "fork": 4, "cut": 2, "cancel": 1.5, "promote": 1, "release": 0.7, "score": 2,
    "step": 12,
}  # fmt: skip


def fuzz(rig: Rig, rng: Random, operations: int) -> None:
    roots = [rig.root([rng.randrange(50) for _ in range(rng.randint(1, 9))]) for _ in range(3)]
    for _ in range(operations):
        alive = [k for k in rig.known if not k.dead]
        idle = [k for k in alive if not k.running]
        match rng.choices(*zip(*VERBS.items(), strict=True))[0]:
            case "extend" if idle:
                stop = frozenset(rng.sample(range(50), rng.choice([0, 5])))
                known = rng.choice(idle[-12:])
                if known not in roots:
                    route = rng.choice([None, None, RouteNoise(K=1), RouteNoise(K=3)])
                    how = {"priority": rng.choice([0, 0, 1]), "stop": stop, "route": route}
                    rig.extend(known, rng.randint(1, 9), **how)
            case "fork" if idle:
                rig.fork(rng.choice(idle[-12:]))
            case "cut" if idle:
                parent = rng.choice(idle)
                rig.fork(parent, rng.randint(1, len(parent.tokens)))
            case "cancel" if len(alive) > 8:
                rig.cancel(rng.choice([k for k in alive if k not in roots]))
            case "promote" if alive:
                rig.keeper.promote(rng.choice(alive).path)
            case "release" if len(idle) > 8:
                known = rng.choice([k for k in idle if k not in roots] or idle)
                known.dead = known not in roots
                rig.keeper.release(known.path)
            case "score" if idle:
                rig.score(rng.choice(idle[-12:]))
            case _:
                for _ in range(rng.randint(1, 4)):
                    if rig.engine.has_work:
                        rig.engine.step()
