"""Methods of search at several budgets, run on the engine over a task's problems.

Every method sees the same problems with the same seeds, so path i of a problem is the same for all.
Tokens are all that were generated: of pruned paths, probes, speculation and repeated passes too.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.replay import Replay, Text
from benchmarks.search_stats import Runs
from jaxserve.protocol import Node, Question
from reasoning.answers import Answer, Candidate, best_of, vote
from reasoning.controllers import CONTROLLERS
from reasoning.pool import run_pool
from reasoning.questions import question_of
from reasoning.result import Budget, Piece, Result
from reasoning.tasks import Problem, Task, distinct

BUDGETS = (4, 8, 16, 32, 64)
"""In paths of plain sampling; `EVERY` for the whole evaluation."""

EVERY = (4, 8, 16, 32, 64, 128, 256)

SETTINGS = Path(__file__).with_name("search_settings.json")
"""Hyper-parameters by method, as `benchmarks.search_tuning` chose them on the dev split."""

PATH = 35.0
"""Tokens of a plain path, on average: what a budget of one path is."""

TOGETHER = 32  # problems searched at a time


@dataclass(frozen=True)
class Field:
    """Where methods meet.

    Attributes:
        first: number of the first problem, where others are measured elsewhere.
    """

    llm: Any
    task: Task
    problems: tuple[Problem, ...]
    seeds: tuple[int, ...]
    first: int = 0

    @staticmethod
    def of(
        llm: Any,
        task: Task,
        split: Any,
        count: int,
        seeds: Sequence[int],
        share: tuple[int, int] = (0, 1),
    ) -> Field:
        """Share i of n, counted from 0, of a draw of `count` problems."""
        problems = tuple(distinct(task, split, 1000 + min(seeds), count))
        start, end = (count * i // share[1] for i in (share[0], share[0] + 1))
        return Field(llm, task, problems[start:end], tuple(seeds), start)

    def questions(self) -> Iterator[tuple[int, int, Question]]:
        """Problem, seed, question."""
        words, most = self.llm.tokenizer, self.llm.max_model_len // 2
        for s, seed in enumerate(self.seeds):
            for p, problem in enumerate(self.problems):
                own = 1_000_003 * seed + self.first + p
                yield p, s, question_of(self.task, problem, words, seed=own, max_tokens=most)

    def search(self, controller: Any, budget: Budget, **options: Any) -> list[list[Result]]:
        """Results [problem][seed]."""
        found: list[list[Any]] = [[None] * len(self.seeds) for _ in self.problems]
        asked = list(self.questions())
        for first in range(0, len(asked), TOGETHER):
            part = asked[first : first + TOGETHER]
            results = self.llm.search([q for _, _, q in part], controller, budget, **options)
            for (p, s, _), result in zip(part, results, strict=True):
                found[p][s] = result
        return found

    def is_right(self, problem: Problem, answer: Hashable | None) -> bool:
        """Of a task whose answers can be compared."""
        return answer == self.task.answer(problem)


def settings_of(name: str) -> dict[str, Any]:
    """What was chosen for a method on the dev split."""
    return json.loads(SETTINGS.read_text()).get(name, {})


def runs(
    field: Field,
    name: str,
    budgets: Sequence[int],
    settings: Mapping[str, Any],
    scorer: str | None = None,
) -> Runs:
    """A method under budgets of so many paths' tokens."""
    right, tokens = [], []
    for paths in budgets:
        controller = CONTROLLERS[name](**{**sized(name, paths), **settings})
        budget = Budget(tokens=round(paths * PATH))
        found = field.search(controller, budget, scorer=scorer)
        right.append(_right(field, found, lambda result: result.answer))
        tokens.append([[spent(r) for r in row] for row in found])
    return Runs(np.array(right), np.array(tokens, float))


def sized(name: str, paths: int) -> dict[str, Any]:
    """What a budget of so many paths means to a method that counts paths.

    DeepConf and HyPER give paths up before their end, so a budget has room for more of them.
    """
    if name == "deepconf":
        return {"paths": 2 * paths, "warmup": min(16, max(paths // 2, 2)), "batch": 1}
    if name == "hyper":
        return {"paths": 16 * paths}
    counts = {"adaptive-consistency", "esc", "certaindex", "slim-sc", "best-of-n"}
    return {"paths": paths} if name in counts else {}


def spent(result: Result) -> int:
    return result.ledger.generated + result.ledger.effective


# ---- plain sampling, which is run once for all budgets ---------------------------------------


def sampled(field: Field, most: int, scorer: str | None = "prm") -> list[list[list[Piece]]]:
    """Paths of every problem and seed with their scores [problem][seed][path]."""
    found = field.search(CONTROLLERS["best-of-n"](paths=most), Budget(), scorer=scorer)
    return [[_paths(result) for result in row] for row in found]


def _paths(result: Result) -> list[Piece]:
    """Paths in the order of their indices."""
    paths = [p for p in result.tree if p.parent is not None]
    return sorted(paths, key=lambda piece: piece.node.path)


Vote = Callable[[Sequence[Piece]], Answer]


def majority(paths: Sequence[Piece]) -> Answer:
    """Self-consistency."""
    return vote(Candidate(p.answer, node=p.node) for p in paths)


def by_score(paths: Sequence[Piece], power: float = 1.0) -> Answer:
    """The vote weighted by a power of a reward head's scores."""
    return vote(Candidate(p.answer, (p.score or 0.0) ** power, p.node) for p in paths)


def best(paths: Sequence[Piece]) -> Answer:
    """Best of N by a reward head."""
    return best_of(Candidate(p.answer, p.score or 0.0, p.node) for p in paths)


def prefixes(
    field: Field, paths: list[list[list[Piece]]], budgets: Sequence[int], choose: Vote
) -> Runs:
    """A method that decides among the first N paths, at every N."""
    right, tokens = [], []
    for n in budgets:
        cut = [[row[:n] for row in seeds] for seeds in paths]
        right.append(_right(field, cut, lambda row: choose(row).answer))
        tokens.append([[sum(len(p.tokens) for p in row) for row in seeds] for seeds in cut])
    return Runs(np.array(right), np.array(tokens, float))


def replayed(
    field: Field,
    paths: list[list[list[Piece]]],
    name: str,
    budgets: Sequence[int],
    settings: Mapping[str, Any],
) -> Runs:
    """A method that looks at whole paths alone, on those that were sampled: the same answers."""

    async def search(policy: Any, question: Question, known: Sequence[Piece], tokens: int) -> Any:
        budget = Budget(tokens=tokens)
        return await run_pool(policy, Replay(Sampled(known)), question, budget, query=0)

    async def all_of_them() -> list[list[list[Any]]]:
        grid = list[list[list[Any]]]()
        for n in budgets:
            policy = CONTROLLERS[name](**{**sized(name, n), **settings})
            rows: list[list[Any]] = [[None] * len(field.seeds) for _ in field.problems]
            for p, s, question in field.questions():
                most = round(n * PATH)
                rows[p][s] = await search(policy, question, paths[p][s], most)
            grid.append(rows)
        return grid

    grid = asyncio.run(all_of_them())
    right = [_right(field, rows, lambda result: result.answer) for rows in grid]
    tokens = [[[r.notes["spent"] for r in row] for row in rows] for rows in grid]
    return Runs(np.array(right), np.array(tokens, float))


@dataclass(frozen=True)
class Sampled:
    """Whole paths as a replay's source; nobody kept what they were sure of."""

    paths: Sequence[Piece]

    def whole(self, index: int) -> Text:
        tokens = self.paths[index].tokens
        zeros = (0.0,) * len(tokens)
        return Text(tokens, zeros, zeros, zeros, zeros)

    def branch(self, parent: Text, at: int, node: Node) -> Text:
        raise ValueError("whole paths alone were sampled")


def oracle(field: Field, paths: list[list[list[Piece]]], budgets: Sequence[int]) -> Runs:
    """pass@k: whether any of the first k paths is right."""
    grid = [
        [[any(field.is_right(p, x.answer) for x in row[:n]) for row in seeds]
         for p, seeds in zip(field.problems, paths, strict=True)]
        for n in budgets
    ]  # fmt: skip
    tokens = [
        [[sum(len(x.tokens) for x in row[:n]) for row in seeds] for seeds in paths] for n in budgets
    ]
    return Runs(np.array(grid), np.array(tokens, float))


def _right(
    field: Field, found: Sequence[Sequence[Any]], answer: Callable[[Any], Hashable | None]
) -> list[list[bool]]:
    return [
        [field.is_right(problem, answer(item)) for item in row]
        for problem, row in zip(field.problems, found, strict=True)
    ]
