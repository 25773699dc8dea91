"""Scorers besides the model's own head: another model, the model when asked, a program."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.errors import RequestError
from jaxserve.paths.pool import EnginePool
from jaxserve.paths.scorers import Oracle, OtherModel, Said, SelfEvaluation
from jaxserve.protocol import Gen, Node, PathStats, Scored, SearchError
from reasoning.controllers.best_of_n import BestOfN
from reasoning.controllers.rebase import Rebase
from reasoning.controllers.self_consistency import SelfConsistency
from reasoning.result import Result

MODELS = Path(__file__).parents[3] / "models"
PROMPT, OTHER = "12 9 2 4 5 :", "3 7 11 2 20 :"
SMALL: dict[str, Any] = {"max_num_seqs": 16, "max_num_batched_tokens": 32, "progress": False}


@pytest.fixture(scope="module")
def engine() -> Iterator[LLM]:
    with LLM(MODELS / "modchain-moe", **SMALL) as llm:
        llm.wait_until_warm()
        yield llm


@pytest.fixture(scope="module")
def other() -> Iterator[LLM]:
    with LLM(MODELS / "modchain-moe", **SMALL) as llm:
        llm.wait_until_warm()
        yield llm


@pytest.fixture
def llm(engine: LLM) -> Iterator[LLM]:
    yield engine
    has_given_back(engine)


@pytest.fixture
def judge(other: LLM) -> Iterator[LLM]:
    yield other
    has_given_back(other)


def has_given_back(llm: LLM) -> None:
    assert llm.drain(10)
    stats = llm.stats()
    assert stats.num_free_pages == stats.num_pages


def ids(llm: LLM, text: str = PROMPT, special: bool = True) -> tuple[int, ...]:
    assert llm.tokenizer is not None
    return tuple(llm.tokenizer.encode(text, add_special_tokens=special))


def drive(llm: LLM, work: Callable[[EnginePool], Coroutine[Any, Any, Any]], **options: Any) -> Any:
    async def run() -> Any:
        pool = llm.searches.pool(**options)
        try:
            return await work(pool)
        finally:
            pool.close(0)

    return asyncio.run(run())


async def grown(pool: EnginePool, llm: LLM, count: int = 4, tokens: int = 12) -> list[Node]:
    root = pool.root(ids(llm), query=0, seed=1)
    nodes = [pool.fork(root, i) for i in range(count)]
    await asyncio.gather(*[pool.extend(node, Gen(tokens, 3.0)) for node in nodes])
    return nodes


# ---- batches and memory ----------------------------------------------------------------------


@dataclass
class Noted:
    """Says how long paths are, and notes what it was asked."""

    scale: float = 100.0
    latency: float = 0.0
    batches: list[list[Said]] = field(default_factory=list[list[Said]])
    closed: list[int] = field(default_factory=list[int])
    name: ClassVar[str] = "noted"

    def session(self, pool: EnginePool) -> Noted:
        return self

    async def score_batch(self, paths: Sequence[Said]) -> list[float]:
        self.batches.append(list(paths))
        return [len(said.tokens) / self.scale for said in paths]

    def close(self, query: int) -> None:
        self.closed.append(query)


def test_what_is_asked_at_a_time_is_one_batch_and_no_text_is_asked_twice(llm: LLM):
    noted = Noted()

    async def work(pool: EnginePool) -> None:
        nodes = await grown(pool, llm)
        same = pool.fork(nodes[0], 7)  # its text is its parent's
        both = [*nodes, same]
        values = await asyncio.gather(*[pool.score(n, scorer="noted") for n in both])
        assert values == [0.12] * 5
        assert [len(batch) for batch in noted.batches] == [4]
        await pool.score(same, scorer="noted")
        assert len(noted.batches) == 1
        await pool.extend(same, Gen(3))
        assert await pool.score(same, scorer="noted") == 0.15
        assert [len(batch) for batch in noted.batches] == [4, 1]
        said = noted.batches[1][0]
        assert said.decode(said.prompt) == PROMPT and said.tokens == pool.stats(same).tokens

    drive(llm, work, scorers={"noted": noted})
    assert noted.closed == [0]


def test_latency_is_waited_for_once_a_batch(llm: LLM):
    async def work(pool: EnginePool) -> float:
        nodes = await grown(pool, llm)
        began = time.monotonic()
        await asyncio.gather(*[pool.score(n, scorer="noted") for n in nodes])
        took = time.monotonic() - began
        return took

    assert 0.3 <= drive(llm, work, scorers={"noted": Noted(latency=0.3)}) < 1.0


def test_what_is_no_score_is_an_error_and_the_next_to_ask_may_have_one(llm: LLM):
    noted = Noted(scale=1.0)

    async def work(pool: EnginePool) -> None:
        (node,) = await grown(pool, llm, 1)
        with pytest.raises(SearchError, match=r"'noted' said \[12.0\] of 1 paths"):
            await pool.score(node, scorer="noted")
        noted.scale = 24.0
        assert await pool.score(node, scorer="noted") == 0.5

    drive(llm, work, scorers={"noted": noted})


def test_one_that_gives_up_takes_no_score_from_others(llm: LLM):
    async def work(pool: EnginePool) -> None:
        (node,) = await grown(pool, llm, 1)
        twin = pool.fork(node, 0)
        waits = [pool.score(n, scorer="noted") for n in (node, twin)]
        await asyncio.sleep(0.02)
        pool.cancel(twin)
        assert await waits[0] == 0.12
        assert waits[1].cancelled() or waits[1].cancelling()  # type: ignore[attr-defined]

    drive(llm, work, scorers={"noted": Noted(latency=0.1)})


# ---- another model ---------------------------------------------------------------------------


def scores(result: Result) -> list[float | None]:
    return [piece.score for piece in result.tree]


@pytest.mark.parametrize("controller", [Rebase(width=6), BestOfN(paths=6)], ids=["tree", "pool"])
def test_another_model_with_the_same_head_says_the_same(llm: LLM, judge: LLM, controller: Any):
    own = llm.search([PROMPT, OTHER], controller, step="|")
    far = llm.search([PROMPT, OTHER], controller, step="|", scorer=judge)
    for a, b in zip(own, far, strict=True):
        assert [p.tokens for p in a.tree] == [p.tokens for p in b.tree]
        assert scores(b)[1:] == pytest.approx(scores(a)[1:], abs=2e-3)
        assert a.ledger.scorer == 0 < b.ledger.scorer <= b.ledger.generated
        assert b.ledger.committed == a.ledger.committed


def test_another_model_reads_what_paths_share_once(llm: LLM, judge: LLM):
    async def work(pool: EnginePool) -> None:
        nodes = await grown(pool, llm, 2)
        await asyncio.gather(*[pool.score(n, scorer="other-model") for n in nodes])
        assert pool.ledger(0).scorer == 24
        child = pool.fork(nodes[0], 5)
        await pool.extend(child, Gen(4))
        before = judge.stats().num_steps
        await pool.score(child, scorer="other-model")
        assert judge.stats().num_steps - before <= 2
        assert pool.ledger(0).scorer == 24 + 4, "what its parent says was read before"

    drive(llm, work, scorers={"other-model": judge.searches.as_scorer(llm.searches)})


def test_models_of_other_words_exchange_text(llm: LLM, judge: LLM):
    assert llm.tokenizer is not None
    decode, encode = llm.tokenizer.decode, llm.tokenizer.encode
    translated = OtherModel(judge.searches.pool, lambda tokens: encode(decode(tokens)))

    async def work(pool: EnginePool) -> None:
        nodes = await grown(pool, llm)
        for node in nodes:
            own, far = await asyncio.gather(pool.score(node), pool.score(node, scorer="far"))
            assert far == pytest.approx(own, abs=2e-3)

    drive(llm, work, scorers={"far": translated})


def test_a_model_without_a_head_judges_nobody(llm: LLM):
    without = pytest.raises(RequestError, match="has no reward head; load one with reward_head=")
    with LLM(MODELS / "recall-dense", **SMALL) as dense, without:
        llm.search(PROMPT, BestOfN(paths=2), scorer=dense)
    with pytest.raises(RequestError, match="neither a name nor a Scorer nor an LLM"):
        llm.search(PROMPT, BestOfN(paths=2), scorer=3)


# ---- the model itself ------------------------------------------------------------------------


def test_an_opinion_is_the_share_of_yes(llm: LLM):
    bar, yes, no = (ids(llm, word, special=False)[0] for word in ("|", "4", "9"))
    asked = SelfEvaluation((bar,), yes, no)

    async def work(pool: EnginePool) -> list[tuple[tuple[int, ...], float]]:
        nodes = await grown(pool, llm)
        free = await asyncio.gather(*[pool.score(n, scorer=asked.name) for n in nodes])
        assert pool.ledger(0).scorer == 4 * 2 * 2 and pool.ledger(0).committed == 4 * 12
        await asyncio.gather(*[pool.extend(n, Gen(6)) for n in nodes])
        found = [pool.stats(n).tokens for n in nodes]
        return list(zip(found, free, strict=True))

    async def unasked(pool: EnginePool) -> list[tuple[int, ...]]:
        nodes = await grown(pool, llm)
        await asyncio.gather(*[pool.extend(n, Gen(6)) for n in nodes])
        found = [pool.stats(n).tokens for n in nodes]
        return found

    found = drive(llm, work, scorers={asked.name: asked})
    assert [tokens for tokens, _ in found] == drive(llm, unasked), "asking leaves no trace"
    for tokens, value in found:
        text = {"prompt_token_ids": [*ids(llm), *tokens[:12], bar]}
        (out,) = llm.generate([text], SamplingParams(max_tokens=1, logprobs=20, temperature=0))
        said = out.outputs[0].logprobs[0]  # type: ignore[index]
        if yes in said and no in said:
            odds = np.exp([said[yes].logprob, said[no].logprob])
            assert value == pytest.approx(odds[0] / odds.sum(), abs=1e-4)
    assert len({round(value, 6) for _, value in found}) > 1


def test_an_opinion_in_a_full_context_is_an_error(llm: LLM):
    async def work(pool: EnginePool) -> None:
        (node,) = await grown(pool, llm, 1)
        room = llm.max_model_len - len(ids(llm)) - 12
        with pytest.raises(SearchError, match="has no room for the question"):
            await pool.weigh(node, [2] * room, 3)

    drive(llm, work)


def test_certainty_is_between_nothing_and_all(llm: LLM):
    async def work(pool: EnginePool) -> None:
        nodes = await grown(pool, llm)
        values = [await pool.score(n, scorer="certainty") for n in nodes]
        stats = [pool.stats(n) for n in nodes]
        assert all(0 < v < 1 for v in values)
        by_value = sorted(range(4), key=lambda i: values[i])
        assert by_value == sorted(range(4), key=lambda i: np.mean(stats[i].confidences))
        pool._record(nodes[0]).known = replace(stats[0], confidences=(np.log(8),) * 3)
        assert await pool.score(nodes[0], scorer="certainty") == pytest.approx(0, abs=1e-12)
        pool._record(nodes[0]).known = PathStats(())
        assert await pool.score(nodes[0], scorer="certainty") == 0

    drive(llm, work)


# ---- a program -------------------------------------------------------------------------------


def test_an_oracle_reads_text_and_is_called_one(llm: LLM):
    seen = list[tuple[str, str]]()

    events = list[Any]()
    votes = llm.search(PROMPT, SelfConsistency(paths=16))
    wanted = next(answer for answer in votes.distribution if answer != votes.answer)

    def prefers(prompt: str, text: str) -> float:
        seen.append((prompt, text))
        return 0.9 if text.endswith(f"; {wanted} |") else 0.1

    found = llm.search(PROMPT, BestOfN(paths=16), scorer=Oracle(prefers), on_event=events.append)
    assert found.answer == wanted != votes.answer
    assert {prompt for prompt, _ in seen} == {PROMPT}
    assert {e.scorer for e in events if isinstance(e, Scored)} == {"oracle"}


# ---- the reward head -------------------------------------------------------------------------


def test_the_head_looks_at_paths_only_where_its_scores_are_wanted(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
):
    looked = list[Any]()
    judge_step = llm._runner._judge

    def noted(launched: Any) -> Any:
        looked.append(launched)
        return judge_step(launched)

    monkeypatch.setattr(llm._runner, "_judge", noted)
    llm.search(PROMPT, BestOfN(paths=3), scorer="confidence")
    assert not looked
    assert llm.search(PROMPT, BestOfN(paths=3)).answer is not None
    assert looked

    async def work(pool: EnginePool) -> None:
        (node,) = await grown(pool, llm, 1)
        with pytest.raises(SearchError, match="begun with another scorer"):
            await pool.score(node)

    drive(llm, work, judged=False)
