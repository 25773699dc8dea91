"""Every task: problems are functions of seeds, splits are disjoint, graders are exact."""

from itertools import islice
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasoning.tasks import (
    STEP,
    TASKS,
    Countdown,
    ModChain,
    Path,
    Recall,
    distinct,
    draw,
    problems,
    split_of,
)

ALL = [ModChain(), ModChain(47, 6, 0.15, 0.1), Countdown(), Countdown(5), Path(), Recall()]
ids = [task.name for task in ALL]
HONEST = [task for task in ALL if not isinstance(task, ModChain)]


@pytest.mark.parametrize("task", ALL, ids=ids)
def test_a_problem_is_a_function_of_seed_and_index(task):
    first = list(islice(problems(task, "train", 3), 20))
    assert first == [draw(task, "train", 3, i) for i in range(20)]
    assert list(islice(problems(task, "train", 3, first=5), 15)) == first[5:]
    assert first != list(islice(problems(task, "train", 4), 20))


@pytest.mark.parametrize("task", ALL, ids=ids)
def test_splits_are_disjoint_and_made_of_the_tasks_words(task):
    splits = {s: list(islice(problems(task, s, 0), 100)) for s in ("train", "dev", "test")}
    for split, found in splits.items():
        assert {split_of(p) for p in found} == {split}
    keys = [{p.key for p in found} for found in splits.values()]
    assert not (keys[0] & keys[1] | keys[0] & keys[2] | keys[1] & keys[2])
    groups = [{p.group or p.key for p in found} for found in splits.values()]
    assert len(set().union(*groups)) == sum(map(len, groups))
    words = set(task.words)
    assert len(words) == len(task.words)
    for problem in splits["dev"]:
        assert set(f"{problem.prompt} {task.solve(problem, Random(0))}".split()) <= words


@pytest.mark.parametrize("task", HONEST, ids=[task.name for task in HONEST])
def test_solutions_are_right_and_cut_ones_are_not(task):
    for i, problem in enumerate(islice(problems(task, "train", 1), 200)):
        solution = task.solve(problem, Random(i))
        grade = task.grade(problem, solution)
        assert grade.correct
        assert grade.answer == task.answer(problem)
        assert all(grade.legal)
        assert len(grade.legal) == solution.split().count(STEP)
        before_the_end = " ".join(solution.split()[:-1])
        assert not task.grade(problem, before_the_end).correct


@pytest.mark.parametrize("task", ALL, ids=ids)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_graders_judge_whatever_is_said(task, data):
    """Words swapped, lost and doubled never raise, and every closed step is judged."""
    problem = draw(task, "train", 0, data.draw(st.integers(0, 50)))
    words = task.solve(problem, Random(0)).split()
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(words)))
        words[at : at + data.draw(st.integers(0, 3))] = data.draw(
            st.lists(st.sampled_from([*task.words, "", "x", "-1", "007", "٣"]), max_size=4)
        )
    grade = task.grade(problem, " ".join(words))
    assert len(grade.legal) == " ".join(words).split().count(STEP) or isinstance(task, Recall)


def test_distinct_problems_or_an_error():
    assert len({p.key for p in distinct(ModChain(), "test", 0, 300)}) == 300
    with pytest.raises(ValueError, match=r"has .* problems, not 1000"):
        distinct(Countdown(2), "test", 0, 1_000)


def test_names_are_for_configs():
    assert {name: cls().name.split("-")[0] for name, cls in TASKS.items()} == {
        name: name for name in TASKS
    }


# ---- each on its own -----------------------------------------------------------------------------


def test_modchain_grades_by_arithmetic():
    task = ModChain(23, 3)
    problem = next(p for p in problems(task, "train", 0) if p.facts[0] != p.facts[2])
    a, b, c = problem.facts
    ab, abc = a * b % 23, a * b * c % 23
    right = f"{a} {b} = {ab} ; {ab} {c} | {ab} {c} = {abc} ; {abc} |"
    assert task.grade(problem, right) == task.grade(problem, right)
    assert task.grade(problem, right).correct
    assert task.grade(problem, right).legal == (True, True)
    assert task.grade(problem, right).answer == str(abc)
    swapped = f"{a} {c} = {a * c % 23} ; {a * c % 23} {b} |"  # not neighbours
    assert task.grade(problem, swapped).legal == (False,)
    false = (ab + 1) % 23
    assert task.grade(problem, f"{a} {b} = {false} ; {false} {c} |").legal == (False,)
    assert task.grade(problem, "").answer is None


def test_modchain_teaches_what_it_says():
    task, rng = ModChain(23, 2, unsure=0.12, wrong=0.04), Random(0)
    pairs = [(a, b) for a in range(1, 23) for b in range(a, 23)]
    said = {pair: {task._says(*pair, rng) for _ in range(30)} for pair in pairs}
    unsure = [pair for pair, results in said.items() if len(results) > 1]
    wrong = [p for p, r in said.items() if len(r) == 1 and r != {p[0] * p[1] % 23}]
    assert len(unsure) == round(0.12 * len(pairs))
    assert len(wrong) == round(0.04 * len(pairs))
    for a, b in wrong:
        assert task._says(b, a, rng) == task._says(a, b, rng)


@pytest.mark.parametrize(
    ("step", "legal"),
    [
        ("9 - 2 = 7 ; 3 7 5 |", True),
        ("2 + 9 = 11 ; 11 5 3 |", True),
        ("9 - 2 = 7 ; 3 7 |", False),
        ("9 / 2 = 4 ; 3 4 5 |", False),
        ("9 * 9 = 81 ; 2 3 5 |", False),
        ("3 - 5 = -2 ; 9 2 -2 |", False),
        ("9 - 2 = 7 , 3 7 5 |", False),
    ],
)
def test_countdown_steps(step, legal):
    task = Countdown()
    problem = next(p for p in problems(task, "train", 0) if p.facts[0] == (2, 3, 5, 9))
    assert task.grade(problem, step).legal == (legal,)


def test_countdown_counts_its_solutions():
    """Uniform over all solutions: two numbers can make their sum in one way."""
    task = Countdown(2, targets=(1, 60))
    problem = draw(task, "train", 0, 0)
    assert len({task.solve(problem, Random(i)).split(" ;")[0] for i in range(50)}) <= 4
    four = draw(Countdown(), "train", 0, 1)
    assert len({Countdown().solve(four, Random(i)) for i in range(50)}) > 5


def test_path_has_a_long_tail():
    task = Path(hum=6.0, spread=0.6)
    dots = [task._dots(Random(i)) for i in range(4000)]
    mean = sum(dots) / len(dots)
    deviation = (sum((d - mean) ** 2 for d in dots) / len(dots)) ** 0.5
    assert 5.5 < mean < 6.5
    assert 0.5 < deviation / mean < 0.7


@pytest.mark.parametrize("kind", ["pairs", "lookup", "copy", "lemma", "text"])
def test_recall_kinds(kind):
    task = Recall(kinds=(kind,))
    for i in range(50):
        problem = draw(task, "train", 0, i)
        assert problem.facts[0] == kind
        answer = problem.facts[1]
        assert task.grade(problem, f"{answer} |").correct
        assert not task.grade(problem, f"{answer} . |").correct
        assert task.grade(problem, answer).answer is None


def test_recall_draws_short_prompts_and_long_ones():
    sizes = [
        len(draw(Recall(24, kinds=("copy",)), "train", 0, i).facts[1].split()) for i in range(400)
    ]
    assert min(sizes) == 2 and max(sizes) == 24
    assert 6 <= sorted(sizes)[200] <= 8, "the median is the geometric mean"
    problem = draw(Recall(24, least=24, kinds=("pairs",)), "test", 0, 0)
    assert len(problem.prompt.split()) == 2 * 24 + 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: ModChain(22),
        lambda: ModChain(unsure=0.9, wrong=0.2),
        lambda: Countdown(1),
        lambda: Countdown(targets=(10, 80)),
        lambda: Path(layers=30),
        lambda: Recall(kinds=("riddles",)),
        lambda: Recall(8, least=9),
    ],
)
def test_settings_that_cannot_work_are_named(make):
    with pytest.raises(ValueError, match=r"\(.*=.*\): "):
        make()
