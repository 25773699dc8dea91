"""Which steps of a model's own solutions are on a way to the answer: what reward heads learn from.

A step is right if it and all before it are legal, and if the model, going on from there, comes to
a right answer at least once in several tries (reasoning as in Math-Shepherd; Wang et al., 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from reasoning.tasks import STEP, Problem, Task
from reasoning.tasks.task import closed_steps

Generate = Callable[[Sequence[str], int], list[list[str]]]
"""(prompts, n) -> n continuations of each."""


@dataclass(frozen=True)
class Labelled:
    """A solution whose closed steps have been judged.

    Attributes:
        text: prompt and solution, up to its last closed step.
        labels: for each step, whether it is right.
        correct: whether the solution as a whole is.
    """

    text: str
    labels: tuple[bool, ...]
    correct: bool


def label_steps(
    task: Task, problems: Sequence[Problem], generate: Generate, samples: int, tries: int
) -> list[Labelled]:
    """`samples` solutions of each problem, every step tried on `tries` times."""
    solutions = [
        (problem, solution)
        for problem, group in zip(
            problems, generate([p.prompt for p in problems], samples), strict=True
        )
        for solution in group
    ]
    starts = [
        (i, start)
        for i, (problem, solution) in enumerate(solutions)
        for start in _legal_starts(task, problem, solution)
    ]
    goes_on = generate([f"{solutions[i][0].prompt} {start}" for i, start in starts], tries)
    right = [0] * len(solutions)  # steps that are: those that are form a beginning
    alive = [True] * len(solutions)
    for (i, start), rests in zip(starts, goes_on, strict=True):
        problem = solutions[i][0]
        alive[i] &= any(task.grade(problem, f"{start} {rest}").correct for rest in rests)
        right[i] += alive[i]
    return [_labelled(task, *solution, n) for solution, n in zip(solutions, right, strict=True)]


def step_oracle(task: Task, problems: Sequence[Problem]) -> Callable[[str, str], float]:
    """What says, by the prompt of one of the problems and a path's text: 1 while every closed step
    follows from the ones before it, else 0."""
    by_prompt = {problem.prompt: problem for problem in problems}

    def judge(prompt: str, text: str) -> float:
        return float(all(task.grade(by_prompt[prompt], text).legal))

    return judge


def _legal_starts(task: Task, problem: Problem, solution: str) -> list[str]:
    """The solution up to each of its steps, while all are legal."""
    legal = task.grade(problem, solution).legal
    steps = _steps(solution)
    count = next((n for n, is_legal in enumerate(legal) if not is_legal), len(legal))
    return [" ".join(steps[: n + 1]) for n in range(count)]


def _steps(solution: str) -> list[str]:
    """Its closed steps, each with its end."""
    return [" ".join([*words, STEP]) for words in closed_steps(solution)]


def _labelled(task: Task, problem: Problem, solution: str, right: int) -> Labelled:
    steps = _steps(solution)
    labels = tuple(n < right for n in range(len(steps)))
    text = " ".join([problem.prompt, *steps])
    return Labelled(text, labels, task.grade(problem, solution).correct)
