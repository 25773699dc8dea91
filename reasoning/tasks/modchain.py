"""ModChain: multiply numbers modulo a prime, two neighbours at a time, with gaps in one's tables.

    9 4 17 2 11 : 4 17 = 22 ; 9 22 2 11 | 2 11 = 22 ; 9 22 22 | 9 22 = 14 ; 14 22 | 14 22 = 9 ; 9 |

Any order is right, so samples differ, and all right ones end in the same value, so answers can be
voted on. Of all products a share `unsure` is taught with a new random result each time: a learner
can only come to know that it does not know. A share `wrong` is taught with one and the same false
result: it will be sure of it. Both are properties of the task, the same for every seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod
from random import Random

from reasoning.tasks.task import STEP, Grade, Problem, closed_steps


@dataclass(frozen=True)
class ModChain:
    """`length` residues modulo the prime `modulus`.

    Attributes:
        unsure: share of the products that are taught with random results (h_u).
        wrong: share that is taught with one false result each (h_c).
    """

    modulus: int = 23
    length: int = 5
    unsure: float = 0.12
    wrong: float = 0.04

    def __post_init__(self):
        if not 0 <= self.unsure + self.wrong <= 1:
            raise ValueError(f"{self}: unsure and wrong are shares of all products")
        if (
            self.length < 2
            or self.modulus < 3
            or any(self.modulus % d == 0 for d in range(2, int(self.modulus**0.5) + 1))
        ):
            raise ValueError(f"{self}: length must be at least 2, and modulus an odd prime")

    @property
    def name(self) -> str:
        return f"modchain-{self.modulus}-{self.length}"

    @property
    def words(self) -> tuple[str, ...]:
        return (*map(str, range(self.modulus)), ":", "=", ";", STEP)

    @cached_property
    def _taught(self) -> dict[tuple[int, int], int | None]:
        """What deviates from the table of products, by ordered pair; None: random each time."""
        rng = Random(f"{self}")
        pairs = [(a, b) for a in range(1, self.modulus) for b in range(a, self.modulus)]
        rng.shuffle(pairs)
        num_unsure, num_wrong = round(self.unsure * len(pairs)), round(self.wrong * len(pairs))
        taught: dict[tuple[int, int], int | None] = dict.fromkeys(pairs[:num_unsure])
        for a, b in pairs[num_unsure : num_unsure + num_wrong]:
            taught[a, b] = rng.choice([c for c in range(1, self.modulus) if c != self._times(a, b)])
        return taught

    def _times(self, a: int, b: int) -> int:
        return a * b % self.modulus

    def _says(self, a: int, b: int, rng: Random) -> int:
        """The result that the teacher writes down."""
        c = self._taught.get((min(a, b), max(a, b)), self._times(a, b))
        return rng.randrange(1, self.modulus) if c is None else c

    def problem(self, rng: Random) -> Problem:
        numbers = [rng.randrange(1, self.modulus) for _ in range(self.length)]
        text = " ".join(map(str, numbers))
        return Problem(f"{text} :", text, tuple(numbers))

    def solve(self, problem: Problem, rng: Random) -> str:
        numbers, steps = list(problem.facts), list[str]()
        while len(numbers) > 1:
            i = rng.randrange(len(numbers) - 1)
            a, b = numbers[i : i + 2]
            c = self._says(a, b, rng)
            numbers[i : i + 2] = [c]
            steps.append(f"{a} {b} = {c} ; {' '.join(map(str, numbers))} {STEP}")
        return " ".join(steps)

    def answer(self, problem: Problem) -> str:
        return str(prod(problem.facts) % self.modulus)

    def grade(self, problem: Problem, solution: str) -> Grade:
        """The answer is the single number that is left; only its value counts."""
        numbers, legal = list(problem.facts), list[bool]()
        answer = None
        for step in closed_steps(solution):
            after = self._after(step)
            legal.append(after is not None and self._follows(numbers, step, after))
            numbers = after or []
            answer = str(numbers[0]) if len(numbers) == 1 else None
        return Grade(answer, answer == self.answer(problem), tuple(legal))

    def _after(self, step: list[str]) -> list[int] | None:
        """The numbers that a step leaves; None if it is no step."""
        a, b, equals, c, semicolon, *rest = step + [""] * max(0, 6 - len(step))
        known = {str(i) for i in range(self.modulus)}
        if equals != "=" or semicolon != ";" or not {a, b, c, *rest} <= known:
            return None
        return [int(word) for word in rest]

    def _follows(self, before: list[int], step: list[str], after: list[int]) -> bool:
        a, b, c = int(step[0]), int(step[1]), int(step[3])
        return c == self._times(a, b) and any(
            before[i : i + 2] == [a, b] and [*before[:i], c, *before[i + 2 :]] == after
            for i in range(len(before) - 1)
        )
