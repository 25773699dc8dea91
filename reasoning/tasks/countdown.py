"""Countdown: make the target out of all the numbers with + - * /.

    3 7 2 8 -> 30 : 8 - 3 = 5 ; 2 5 7 | 7 * 5 = 35 ; ...

A step takes two numbers away and puts their result in. Solutions are drawn uniformly from all
there are, numbers stay between 1 and `limit`, and the larger operand is written first. Many
expressions are right, so answers are chosen by a verifier and not by vote.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from random import Random

from reasoning.tasks.task import STEP, Grade, Problem, closed_steps

Numbers = tuple[int, ...]  # ascending


@dataclass(frozen=True)
class Countdown:
    """`length` numbers from 1 to `largest`, and a target. Splits share no multiset of numbers.

    Attributes:
        targets: the least and the greatest.
        limit: intermediate results stay below it.
    """

    length: int = 4
    largest: int = 10
    targets: tuple[int, int] = (10, 49)
    limit: int = 64

    def __post_init__(self):
        if self.length < 2 or not 0 < self.targets[0] <= self.targets[1] < self.limit:
            raise ValueError(f"{self}: needs two numbers or more, and targets below the limit")

    @property
    def name(self) -> str:
        return f"countdown-{self.length}"

    @property
    def words(self) -> tuple[str, ...]:
        return (*map(str, range(self.limit)), ":", "->", "+", "-", "*", "/", "=", ";", STEP)

    def problem(self, rng: Random) -> Problem:
        low, high = self.targets
        while True:
            numbers = tuple(sorted(rng.randint(1, self.largest) for _ in range(self.length)))
            if targets := [t for t in _ways(numbers, self.limit) if low <= t <= high]:
                break
        target, shuffled = rng.choice(targets), list(numbers)
        rng.shuffle(shuffled)
        prompt = f"{' '.join(map(str, shuffled))} -> {target} :"
        key = f"{numbers} {target}"
        return Problem(prompt, key, (numbers, target), group=str(numbers))

    def solve(self, problem: Problem, rng: Random) -> str:
        numbers, target = problem.facts
        steps = list[str]()
        while len(numbers) > 1:
            moves = list(_moves(numbers, self.limit))
            ways = [_ways(move.left, self.limit).get(target, 0) for move in moves]
            move = rng.choices(moves, ways)[0]
            numbers = move.left
            left = list(numbers)
            rng.shuffle(left)
            steps.append(f"{move.text} ; {' '.join(map(str, left))} {STEP}")
        return " ".join(steps)

    def answer(self, problem: Problem) -> str:
        return str(problem.facts[1])

    def grade(self, problem: Problem, solution: str) -> Grade:
        """The answer is the single number left; it counts if every step was legal."""
        numbers = problem.facts[0]
        legal, answer = list[bool](), None
        for step in closed_steps(solution):
            after = self._after(numbers, step)
            legal.append(after is not None)
            numbers = after or ()
            answer = str(numbers[0]) if len(numbers) == 1 else None
        return Grade(answer, answer == self.answer(problem) and all(legal), tuple(legal))

    def _after(self, before: Numbers, step: list[str]) -> Numbers | None:
        """The numbers that a legal step leaves; None if it is not legal."""
        if len(step) < 7 or not {step[0], step[2], step[4], *step[6:]} <= set(
            map(str, range(self.limit))
        ):
            return None
        a, b, c, after = int(step[0]), int(step[2]), int(step[4]), tuple(sorted(map(int, step[6:])))
        if step[3] != "=" or step[5] != ";" or _apply(a, step[1], b) != c:
            return None
        rest = list(before)
        for used in (a, b):
            if used not in rest:
                return None
            rest.remove(used)
        return after if tuple(sorted([*rest, c])) == after else None


@dataclass(frozen=True)
class _Move:
    text: str  # "8 - 3 = 5"
    left: Numbers


def _apply(a: int, sign: str, b: int) -> int | None:
    if sign == "/":
        return a // b if b and a % b == 0 else None
    return {"+": a + b, "-": a - b, "*": a * b}.get(sign)


def _moves(numbers: Numbers, limit: int) -> Iterator[_Move]:
    """Every different step from these numbers."""
    seen = set[tuple[int, int]]()
    for i in range(len(numbers)):
        for j in range(i):
            a, b = numbers[i], numbers[j]  # a >= b
            if (a, b) in seen:
                continue
            seen.add((a, b))
            rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
            for sign in "+-*/":
                c = _apply(a, sign, b)
                if c is not None and 0 < c < limit:
                    yield _Move(f"{a} {sign} {b} = {c}", tuple(sorted([*rest, c])))


@cache
def _ways(numbers: Numbers, limit: int) -> dict[int, int]:
    """How many solutions lead to each number that can be reached."""
    if len(numbers) == 1:
        return {numbers[0]: 1}
    ways: dict[int, int] = {}
    for move in _moves(numbers, limit):
        for target, count in _ways(move.left, limit).items():
            ways[target] = ways.get(target, 0) + count
    return ways
