"""Questions read what solutions claim, right or wrong."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest

from reasoning.questions import last_answer, left_alone, question_of
from reasoning.tasks import Countdown, ModChain, Task, distinct


class Words:
    """A word is a token."""

    def __init__(self, task: Task):
        self.words = list(task.words)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [self.words.index(word) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(self.words[i] for i in ids)


@pytest.mark.parametrize("task", [ModChain(), Countdown()], ids=lambda task: task.name)
def test_a_solution_is_read_as_its_grader_reads_it(task: Task):
    words = Words(task)
    for problem in distinct(task, "dev", 0, 20):
        question = question_of(task, problem, words, seed=3)
        solution = task.solve(problem, Random(0))
        tokens = words.encode(solution)
        assert question.read(tokens) == task.grade(problem, solution).answer is not None
        assert question.read(tokens[: tokens.index(question.step[0])]) is None
        assert question.text is not None and question.text(tokens) == solution


def test_a_wrong_derivation_still_has_an_answer():
    """A grader that answered None here would tell a search which of its paths are wrong."""
    task = Countdown()
    (problem,) = distinct(task, "dev", 0, 1)
    question = question_of(task, problem, Words(task))
    wrong = "1 + 1 = 3 ; 7 3 | 7 + 3 = 11 ; 11 |"
    assert question.read(Words(task).encode(wrong)) == "11"


def test_states_are_what_is_left_of_a_closed_step():
    task = ModChain()
    (problem,) = distinct(task, "dev", 0, 1)
    question, words = question_of(task, problem, Words(task)), Words(task)
    assert question.state is not None
    one = question.state(words.encode("2 3 = 6 ; 6 5 |"))
    other = question.state(words.encode("3 2 = 6 ; 6 5 |"))
    assert one == other != question.state(words.encode("2 3 = 6 ; 5 6 |"))
    assert question.state(words.encode("2 3 = 6 ; 6")) is None
    step = words.encode("2 3 = 6 ; 6 5 |")
    assert one is not None and tuple(step[-len(one) :]) == one, "a step ends with its state"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{\frac12} or 3", r"\frac12"),
        ("It is 1,234.50.", "1234.5"),
        ("-7 then 12", "12"),
        ("no number", None),
        ("", None),
    ],
)
def test_answers_in_prose(text: str, answer: str | None):
    assert last_answer(text) == answer


@pytest.mark.parametrize("text", ["", "1 2 = 3", "1 |", "1 ; |", "1 ; 2 3 |", "| |", "; ; ;"])
def test_what_is_no_answer(text: str):
    assert left_alone(text) is None
