"""Labels of steps: legal, and on a way to the answer."""

from reasoning.step_labels import label_steps, step_oracle
from reasoning.tasks import ModChain, Problem

TASK = ModChain(modulus=7, length=3)
PROBLEM = Problem("2 3 4 :", "2 3 4", (2, 3, 4))  # 24 mod 7 = 3


def fake(solution, rests):
    """The first call gives the solution, the second what `rests` has for each beginning."""
    asked = []

    def generate(prompts, n):
        asked.append((list(prompts), n))
        if len(asked) == 1:
            return [[solution] * n for _ in prompts]
        return [rests.get(p.partition(": ")[2], [""] * n) for p in prompts]

    return generate, asked


def test_a_right_solution_is_right_throughout():
    solution = "2 3 = 6 ; 6 4 | 6 4 = 3 ; 3 |"
    generate, asked = fake(solution, {"2 3 = 6 ; 6 4 |": ["6 4 = 3 ; 3 |", "nonsense"]})
    (found,) = label_steps(TASK, [PROBLEM], generate, 1, 2)
    assert found.labels == (True, True)
    assert found.correct
    assert found.text == f"2 3 4 : {solution}"
    assert asked[1] == ([f"2 3 4 : {start}" for start in ("2 3 = 6 ; 6 4 |", solution)], 2)


def test_what_follows_an_illegal_step_is_wrong_and_not_tried():
    generate, asked = fake("2 3 = 5 ; 5 4 | 5 4 = 6 ; 6 |", {})
    (found,) = label_steps(TASK, [PROBLEM], generate, 1, 2)
    assert found.labels == (False, False)
    assert not found.correct
    assert asked[1] == ([], 2)


def test_a_legal_step_from_which_nothing_succeeds_is_wrong():
    generate, _ = fake("2 3 = 6 ; 6 4 | 6 4 = 3 ; 3 |", {"2 3 = 6 ; 6 4 |": ["6 4 = 5 ; 5 |"]})
    (found,) = label_steps(TASK, [PROBLEM], generate, 1, 1)
    assert found.labels == (False, False)
    assert found.correct


def test_what_is_left_open_is_cut_off():
    generate, _ = fake("2 3 = 6 ; 6 4 | 6 4 =", {"2 3 = 6 ; 6 4 |": ["6 4 = 3 ; 3 |"]})
    (found,) = label_steps(TASK, [PROBLEM], generate, 1, 1)
    assert found.text == "2 3 4 : 2 3 = 6 ; 6 4 |"
    assert found.labels == (True,)


def test_empty_steps_are_steps():
    generate, _ = fake("| | 2 3 = 6", {})
    (found,) = label_steps(TASK, [PROBLEM], generate, 1, 1)
    assert found.text == "2 3 4 : | |"
    assert found.labels == (False, False)


def test_an_oracle_says_whether_all_steps_so_far_are_legal():
    judge = step_oracle(TASK, [PROBLEM])
    said = {"": 1, "2 3 = 6 ; 6 4 |": 1, "2 3 = 6 ; 6 4 | 6": 1, "2 3 = 5 ; 5 4 |": 0, "| |": 0}
    assert {text: judge("2 3 4 :", text) for text in said} == said
