"""From a task's problem, or a user's prompt, to the question that a search is given."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from typing import Protocol

from jaxserve.protocol import Question
from reasoning.tasks import STEP, Problem, Task
from reasoning.tasks.task import closed_steps

_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


class Words(Protocol):
    """A tokenizer, as far as questions need one."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


def question_of(
    task: Task, problem: Problem, words: Words, *, seed: int = 0, max_tokens: int = 256
) -> Question:
    """A problem of a task. Answers are what solutions claim: nobody looks whether that is right."""
    separator = words.encode(";", add_special_tokens=False)

    def read(tokens: Sequence[int]) -> Hashable | None:
        text = words.decode(tokens)
        return left_alone(text) if ";" in text else task.grade(problem, text).answer

    def state(tokens: Sequence[int]) -> tuple[int, ...] | None:
        """What a step says is left: all that steps after it go by."""
        if not tokens or tokens[-1] != step:
            return None
        last = next((i for i in reversed(range(len(tokens))) if tokens[i] in separator), None)
        return None if last is None else tuple(tokens[last + 1 :])

    (step,) = words.encode(STEP, add_special_tokens=False)
    prompt = tuple(words.encode(problem.prompt))
    return Question(prompt, read, (step,), max_tokens, seed, words.decode, state)


def left_alone(text: str) -> str | None:
    """What the last closed step of a solution leaves behind its `;`, if that is one word."""
    steps = closed_steps(text)
    words = steps[-1] if steps else []
    left = words[len(words) - words[::-1].index(";") :] if ";" in words else []
    return left[0] if len(left) == 1 else None


def last_answer(text: str) -> str | None:
    """What a text in mathematics or prose comes to: what is boxed, or else its last number.

    Numbers are compared as text, without commas and trailing zeros.
    """
    if boxed := _BOXED.findall(text):
        return boxed[-1].strip()
    numbers = [n.replace(",", "") for n in _NUMBER.findall(text)]
    if not numbers:
        return None
    return numbers[-1].rstrip("0").rstrip(".") if "." in numbers[-1] else numbers[-1]
