"""Path: walk a layered graph from its start to its goal, at a pace that varies.

    a f , b k , ... ; a -> q : a f . . . | f m . | m q . . |

Each step walks one edge, and then hums a number of dots that is drawn log-normally. Detours make
ways of different lengths. So steps and solutions have long tails: what waits for the slowest of a
group waits long.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from random import Random
from string import ascii_lowercase, ascii_uppercase

from reasoning.tasks.task import STEP, Grade, Problem, closed_steps

NODES = tuple(ascii_lowercase + ascii_uppercase)


@dataclass(frozen=True)
class Path:
    """A graph of `layers` layers of `width` nodes between the start and the goal.

    Attributes:
        detour: probability that an edge of the graph is split by one more node.
        hum: mean number of dots of a step; `spread` is their standard deviation by the mean.
    """

    layers: int = 4
    width: int = 3
    detour: float = 0.3
    hum: float = 6.0
    spread: float = 0.6

    def __post_init__(self):
        if self.layers < 1 or self.width < 2 or self.layers * self.width + 2 > len(NODES):
            raise ValueError(f"{self}: at least one layer of two nodes, {len(NODES)} nodes in all")

    @property
    def name(self) -> str:
        return f"path-{self.layers}"

    @property
    def words(self) -> tuple[str, ...]:
        return (*NODES, ",", "->", ";", ":", ".", STEP)

    def problem(self, rng: Random) -> Problem:
        names = iter(rng.sample(NODES, len(NODES)))
        layers = [
            [next(names)],
            *([next(names) for _ in range(self.width)] for _ in range(self.layers)),
        ]
        layers.append([next(names)])
        edges = list[tuple[str, str]]()
        for here, there in itertools.pairwise(layers):
            for node in here:
                for other in rng.sample(there, min(len(there), 2)):
                    edges += self._edge(node, other, next(names, None), rng)
        rng.shuffle(edges)
        listed = " , ".join(f"{a} {b}" for a, b in edges)
        start, goal = layers[0][0], layers[-1][0]
        prompt = f"{listed} ; {start} -> {goal} :"
        return Problem(prompt, prompt, (tuple(edges), start, goal))

    def _edge(self, a: str, b: str, between: str | None, rng: Random) -> list[tuple[str, str]]:
        if between is None or rng.random() >= self.detour:
            return [(a, b)]
        return [(a, between), (between, b)]

    def solve(self, problem: Problem, rng: Random) -> str:
        """A random walk: every node leads on to the goal."""
        edges, here, goal = problem.facts
        steps = list[str]()
        while here != goal:
            there = rng.choice([b for a, b in edges if a == here])
            steps.append(" ".join([here, there, *"." * self._dots(rng), STEP]))
            here = there
        return " ".join(steps)

    def _dots(self, rng: Random) -> int:
        variance = math.log(1 + self.spread**2)
        return round(rng.lognormvariate(math.log(self.hum) - variance / 2, math.sqrt(variance)))

    def answer(self, problem: Problem) -> str:
        return problem.facts[2]

    def grade(self, problem: Problem, solution: str) -> Grade:
        """The answer is the node that has been reached."""
        edges, here, goal = problem.facts
        legal = list[bool]()
        for step in closed_steps(solution):
            a, b, *dots = step + [""] * max(0, 2 - len(step))
            legal.append(a == here and (a, b) in edges and set(dots) <= {"."})
            here = b
        return Grade(
            here if legal else None, bool(legal) and here == goal and all(legal), tuple(legal)
        )
