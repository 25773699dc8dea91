"""Replays say what was recorded, and a perfect student what its teacher would."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from benchmarks import pool_search
from benchmarks.path_bank import Bank, _signals
from benchmarks.replay import LOST, SURE, WORDS, Ideal, Language, Recorded, Replay
from jaxserve.protocol import Gen, Node
from jaxserve.request import CompletionOutput, Logprob
from reasoning.controllers.hyper import HyPER
from reasoning.controllers.self_consistency import SelfConsistency
from reasoning.pool import run_pool
from reasoning.result import Budget
from reasoning.tasks import ModChain, distinct

TASK, WORD_BANK = ModChain(), Language.of(None)
PROBLEMS = distinct(TASK, "dev", 0, 20)


def bank(num_paths: int = 6) -> Bank:
    """What a perfect student said, written down."""
    paths = [[Ideal(TASK, p, 0).whole(i) for i in range(num_paths)] for p in PROBLEMS[:3]]
    shape = (3, num_paths, 40)
    arrays = [np.full(shape, -1, np.int16), *(np.zeros(shape, np.float32) for _ in range(4))]
    for q, row in enumerate(paths):
        for n, path in enumerate(row):
            for array, values in zip(arrays, vars(path).values(), strict=True):
                array[q, n, : len(values)] = values
    right = np.array([TASK.answer(p) for p in PROBLEMS[:3]])
    prompts = np.array([p.prompt for p in PROBLEMS[:3]])
    return Bank(*arrays, right, prompts, np.array([*WORDS, ""]))


def test_a_perfect_student_knows_what_it_does_not_know():
    low = 0
    for problem in PROBLEMS:
        text = Ideal(TASK, problem, 0).whole(0)
        said = WORD_BANK.text(text.tokens)
        grade = TASK.grade(problem, said)
        assert grade.answer == WORD_BANK.read(text.tokens) and len(grade.legal) == 4
        assert len(text.tokens) == 35 == len(text.confidences)
        low += LOST in text.confidences
        if min(text.confidences) == SURE and not all(grade.legal):
            raise AssertionError("its other errors are of products it was taught wrongly")
    assert 4 < low < 16, "four products, 12 % of which are gaps"


def test_a_students_branch_is_a_legal_continuation():
    problem = PROBLEMS[0]
    source = Ideal(TASK, problem, 0)
    start = source.whole(0)
    at = start.tokens.index(WORDS.index("|")) + 1
    texts = {source.branch(start, at, Node(0, ((0, -1), (i, at)))).tokens for i in range(9)}
    assert len(texts) > 1
    for tokens in texts:
        assert tokens[:at] == start.tokens[:at]
        assert len(TASK.grade(problem, WORD_BANK.text(tokens)).legal) == 4
    with pytest.raises(ValueError, match="end of a step"):
        source.branch(start, 3, Node(0))


def test_states_are_what_is_left():
    tokens = Ideal(TASK, PROBLEMS[0], 0).whole(0).tokens
    at = tokens.index(WORDS.index("|")) + 1
    left = WORD_BANK.state(tokens[:at])
    assert left is not None and len(left) == 5, "four numbers and the end of the step"
    assert WORD_BANK.state(tokens[: at - 1]) is None and WORD_BANK.state(()) is None


def test_a_replay_says_what_was_recorded(tmp_path: Path):
    bank().save(tmp_path / "bank.npz")
    loaded = Bank.load(tmp_path / "bank.npz")
    language = Language.of(loaded)
    source = Recorded(loaded, 1, 0, language.state)
    assert sorted(source.whole(i).tokens for i in range(6)) == sorted(
        Ideal(TASK, PROBLEMS[1], 0).whole(i).tokens for i in range(6)
    )
    with pytest.raises(IndexError, match="6 paths"):
        source.whole(6)

    async def grow() -> None:
        pool = Replay(source)
        node = pool.fork(pool.root((), query=0, seed=0), 2)
        steps = [await pool.extend(node, Gen(10)) for _ in range(4)]
        assert [len(s.tokens) for s in steps] == [10, 10, 10, 5]
        assert [s.reason for s in steps] == ["length"] * 3 + ["end"]
        whole = source.whole(2)
        assert pool.stats(node).tokens == whole.tokens and pool.ledger(0).committed == 35
        at = whole.tokens.index(WORDS.index("|")) + 1
        branch = pool.fork(node, 0, at=at)
        await pool.extend(branch, Gen(99))
        said = pool.stats(branch).tokens
        assert said[:at] == whole.tokens[:at]
        assert language.read(said) is not None

    asyncio.run(grow())


def test_what_is_recorded_of_a_token():
    top = {i: Logprob(x) for i, x in enumerate((-1.5, -0.5, -3.0, *(-9.0,) * 5))}
    tokens, logprobs, entropies, margins, confidences = _signals(
        CompletionOutput(0, token_ids=[0], logprobs=[top]), 12
    )
    assert tokens == [0] and logprobs == (-1.5,) and margins == (1.0,)
    assert confidences[0] == pytest.approx((1.5 + 0.5 + 3.0 + 45) / 8)
    assert 0.7 < entropies[0] < 1.5


def test_searches_of_a_perfect_student_beat_a_plain_vote_at_the_same_cost():
    asked = [list(pool_search.ideal(0.04, 0, 60))]
    plain = pool_search.run(SelfConsistency(paths=8), asked[0], 280)
    hyper = pool_search.run(HyPER(), asked[0], 280)
    assert hyper[0].mean() > plain[0].mean() + 0.03
    assert (hyper[1] <= 280).all() and (plain[1] == 280).all()


def test_the_same_seed_is_the_same_search():
    (pool, question, _), *_ = pool_search.recorded(bank(), 0, 1)
    first, second = (
        asyncio.run(run_pool(HyPER(), pool(), question, Budget(tokens=300), query=0))
        for _ in range(2)
    )
    assert first.tree == second.tree and first.answer == second.answer
