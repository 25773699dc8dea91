"""What a task is: problems drawn from seeds, split by hash, solved by example and graded exactly.

Text is words between single spaces, and a model's vocabulary is the task's own words: one token per
number. A solution is a chain of steps, each closed by `STEP`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any, Literal, Protocol

STEP = "|"
"""The word that ends a step: where reward heads read and searches branch."""

Split = Literal["train", "dev", "test"]


@dataclass(frozen=True)
class Problem:
    """A question.

    Attributes:
        prompt: as the model sees it.
        key: equal for problems that are the same in all but spelling.
        facts: what the task's own methods need to know of it.
        group: problems of a group are in the same split; each is its own unless this says more.
    """

    prompt: str
    key: str
    facts: Any
    group: str = ""


@dataclass(frozen=True)
class Grade:
    """A judgement of one solution, whole or broken off.

    Attributes:
        answer: what it says the answer is; None where it has not come to one.
        correct: whether that is right and, where the task asks for a derivation, was derived.
        legal: for each closed step, whether it follows from the ones before it.
    """

    answer: str | None
    correct: bool
    legal: tuple[bool, ...]


class Task(Protocol):
    """A family of problems."""

    @property
    def name(self) -> str: ...

    @property
    def words(self) -> tuple[str, ...]:
        """Every word of every prompt and solution."""
        ...

    def problem(self, rng: Random) -> Problem: ...

    def solve(self, problem: Problem, rng: Random) -> str:
        """A solution to learn from. Tasks may teach errors on purpose."""
        ...

    def answer(self, problem: Problem) -> str:
        """The one right `Grade.answer`."""
        ...

    def grade(self, problem: Problem, solution: str) -> Grade:
        """Never raises, whatever the solution says."""
        ...


def split_of(problem: Problem) -> Split:
    """Nine tenths of all problems are for training, a twentieth each for tuning and testing."""
    group = problem.group or problem.key
    twentieth = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") % 20
    return "test" if twentieth == 0 else "dev" if twentieth == 1 else "train"


def problems(task: Task, split: Split, seed: int, first: int = 0) -> Iterator[Problem]:
    """An endless stream of a split's problems; problem i is a function of (seed, i) alone."""
    index = first
    while True:
        yield draw(task, split, seed, index)
        index += 1


def draw(task: Task, split: Split, seed: int, index: int) -> Problem:
    """Problem `index` of a split's stream."""
    rng = Random(f"{task.name} {split} {seed} {index}")
    while split_of(problem := task.problem(rng)) != split:
        pass
    return problem


def distinct(task: Task, split: Split, seed: int, count: int) -> list[Problem]:
    """The first `count` problems of a stream that differ.

    Raises:
        ValueError: the split does not seem to hold so many.
    """
    found: dict[str, Problem] = {}
    repeated = 0  # in a row
    for problem in problems(task, split, seed):
        repeated = repeated + 1 if problem.key in found else 0
        found.setdefault(problem.key, problem)
        if len(found) == count:
            return list(found.values())
        if repeated > 200 + 10 * len(found):
            break
    raise ValueError(f"{task.name}: the split {split!r} has {len(found)} problems, not {count}")


def closed_steps(solution: str) -> list[list[str]]:
    """The words of each closed step; what is still open at the end is left out."""
    steps: list[list[str]] = [[]]
    for word in solution.split():
        if word == STEP:
            steps.append([])
        else:
            steps[-1].append(word)
    return steps[:-1]
