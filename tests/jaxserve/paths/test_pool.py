"""Paths of a shipped model on the real engine, from an event loop."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.errors import RequestError
from jaxserve.models.reward_head import log_odds
from jaxserve.paths.pool import EnginePool
from jaxserve.protocol import (
    Cancelled,
    DeadPathError,
    Failed,
    Gen,
    Node,
    Prio,
    Scored,
    SearchError,
    StepDone,
)
from jaxserve.train.data import Batch
from jaxserve.train.loss import training_ops
from jaxserve.train.reward import judged
from tests.jaxserve.paths.driving import PROMPT, drive, ids

MODEL = Path(__file__).parents[3] / "models/modchain-moe"


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(MODEL, progress=False, max_num_batched_tokens=64) as llm:
        llm.wait_until_warm()
        yield llm


def test_greedy_paths_say_what_generate_says(llm: LLM):
    (whole,) = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=60, logprobs=0))

    async def work(pool: EnginePool) -> None:
        root = pool.root(ids(llm), query=0, seed=0)
        node = pool.fork(root, 0)
        said: list[int] = []
        while not said or said[-1] not in llm.tokenizer.eos_token_ids:  # type: ignore[union-attr]
            said += (await pool.extend(node, Gen(7, temperature=0.0))).tokens
        stats = pool.stats(node)
        assert said == whole.outputs[0].token_ids == list(stats.tokens)
        assert stats.logprob == pytest.approx(whole.outputs[0].cumulative_logprob, abs=1e-4)
        assert stats.finished
        pool.close(0)

    drive(llm, work)


def test_a_child_is_a_function_of_its_prefix_its_index_and_the_seed(llm: LLM):
    async def work(pool: EnginePool) -> list[tuple[int, ...]]:
        async def children(query: int, seed: int, busy: int) -> list[tuple[int, ...]]:
            root = pool.root(ids(llm), query=query, seed=seed)
            others = [pool.extend(pool.fork(root, 100 + i), Gen(30)) for i in range(busy)]
            nodes = [pool.fork(root, i) for i in range(3)]
            step = Gen(40, stop=tuple(ids(llm, "|", special=False)))
            firsts = [await pool.extend(node, step) for node in nodes]
            below = [pool.fork(node, 1) for node in nodes]
            steps = await asyncio.gather(*[pool.extend(node, step) for node in below])
            await asyncio.gather(*others)
            pool.close(query)
            return [s.tokens for s in (*firsts, *steps)]

        alone, crowded = await children(0, 5, 0), await children(1, 5, 40)
        other = await children(2, 6, 0)
        assert alone == crowded != other
        return alone

    assert drive(llm, work) == drive(llm, work)


def test_scores_are_those_of_the_head_on_its_own(llm: LLM):
    """Log-odds gathered while paths were made, against one forward pass over their whole text."""

    async def work(pool: EnginePool) -> list[tuple[list[int], float]]:
        root = pool.root(ids(llm), query=0, seed=1)
        bar = tuple(ids(llm, "|", special=False))
        found = list[tuple[list[int], float]]()
        nodes = [pool.fork(root, i) for i in range(4)]
        for _ in range(3):
            await asyncio.gather(*[pool.extend(node, Gen(40, stop=bar)) for node in nodes])
            for node in nodes:
                text = [*ids(llm), *pool.stats(node).tokens]
                found.append((text, await pool.log_odds(node)))
            nodes = [pool.fork(node, 0) for node in nodes]
        cut = pool.fork(nodes[0], 7, at=3)
        found.append(([*ids(llm), *pool.stats(cut).tokens], await pool.log_odds(cut)))
        pool.close(0)
        return found

    found = drive(llm, work)
    texts = [text for text, _ in found]
    head = llm._reward_head
    assert head is not None
    stop = texts[0][-1]
    data = judged(
        llm._family,
        llm.model_config,
        llm.params,
        texts,
        stop,
        [[True] * t.count(stop) for t in texts],
    )
    for row, (text, odds) in enumerate(found):
        alone = np.asarray(log_odds(head, jnp.asarray(data.hidden[row, : len(text)])))[-1]
        assert odds == pytest.approx(float(alone), abs=2e-3)


def test_what_is_awaited_is_also_an_event(llm: LLM):
    async def work(pool: EnginePool) -> None:
        root = pool.root(ids(llm), query=0, seed=0)
        a, b = pool.fork(root, 0), pool.fork(root, 1)
        events = pool.events(0)
        pool.extend(a, Gen(4))
        assert isinstance(first := await anext(events), StepDone) and first.node == a
        value = await pool.score(a)
        scored = await anext(events)
        assert scored == Scored(a, "prm", value) and pool.stats(a).scores == {"prm": value}
        waits = pool.extend(b, Gen(100))
        pool.cancel(b)
        gone = await anext(events)
        assert isinstance(gone, Failed) and isinstance(gone.error, Cancelled)
        with pytest.raises(Cancelled):
            await waits
        pool.close(0)
        assert [event async for event in events] == []

    drive(llm, work)


def test_cancelled_rows_are_gone_with_the_next_step(llm: LLM):
    async def work(pool: EnginePool) -> None:
        root = pool.root(ids(llm), query=0, seed=0)
        nodes = [pool.fork(root, i) for i in range(40)]
        waits = [pool.extend(node, Gen(200)) for node in nodes]
        while pool.capacity().live_rows < 40:
            await asyncio.sleep(0.001)
        pool.cancel(root)
        llm._loop.call(lambda engine: None)
        assert pool.capacity().live_rows == 0
        assert all(isinstance(w.exception(), Cancelled) for w in waits)  # type: ignore[attr-defined]
        pool.close(0)

    drive(llm, work)


def test_the_ledger_knows_every_token(llm: LLM):
    async def work(pool: EnginePool) -> None:
        drawn = llm.stats().generation_tokens_total
        root = pool.root(ids(llm), query=0, seed=0)
        sure, guess, wrong = (pool.fork(root, i) for i in range(3))
        await pool.extend(sure, Gen(6))
        await pool.extend(guess, Gen(5), prio=Prio.SPEC)
        await pool.extend(wrong, Gen(4), prio=Prio.SPEC)
        assert (pool.ledger(0).committed, pool.ledger(0).spec_waste) == (6, 9)
        pool.promote(guess)
        waits = pool.extend(wrong, Gen(200), prio=Prio.SPEC)
        await asyncio.sleep(0.01)
        probe = await pool.probe(sure, ids(llm, "|", special=False), 3)
        ledger = pool.close(0)
        waits.cancel()  # type: ignore[attr-defined]
        assert ledger.spec_hit == 5 and ledger.committed == 6 + 5 + len(probe.tokens)
        assert ledger.generated == llm.stats().generation_tokens_total - drawn
        assert ledger.prefill == len(ids(llm)) + 1

    drive(llm, work)


def test_a_fork_costs_nothing_however_long_the_path(llm: LLM):
    """No page and no copy: the handle of a path knows its parent, and that is all."""

    async def work(pool: EnginePool) -> None:
        root = pool.root(ids(llm), query=0, seed=0)
        node = pool.fork(root, 0)
        await pool.extend(node, Gen(200, temperature=5.0))
        free = pool.capacity().free_pages
        steps = llm.stats().num_steps
        for i in range(1000):
            pool.fork(node, i)
        llm._loop.call(lambda engine: None)
        assert pool.capacity().free_pages == free and llm.stats().num_steps - steps <= 1
        pool.close(0)

    drive(llm, work)


def test_requests_and_searches_share_an_engine(llm: LLM):
    params = SamplingParams(max_tokens=30, seed=7, n=8)
    (alone,) = llm.generate(PROMPT, params)

    async def work(pool: EnginePool) -> Any:
        root = pool.root(ids(llm), query=0, seed=0)
        waits = [pool.extend(pool.fork(root, i), Gen(60), prio=Prio.SPEC) for i in range(60)]
        (among,) = await asyncio.to_thread(llm.generate, PROMPT, params)
        await asyncio.gather(*waits)
        pool.close(0)
        return among

    among = drive(llm, work)
    assert [o.token_ids for o in among.outputs] == [o.token_ids for o in alone.outputs]


def test_what_a_pool_refuses(llm: LLM):
    async def work(pool: EnginePool) -> None:
        with pytest.raises(RequestError, match="1 to 255 tokens"):
            pool.root([], query=0, seed=0)
        with pytest.raises(RequestError, match="not 256"):
            pool.root([2] * 256, query=0, seed=0)
        root = pool.root(ids(llm), query=0, seed=0)
        with pytest.raises(SearchError, match="has begun already"):
            pool.root(ids(llm), query=0, seed=0)
        node = pool.fork(root, 0)
        assert pool.fork(root, 0) == node
        first = pool.extend(node, Gen(5))
        with pytest.raises(SearchError, match="being extended"):
            await pool.extend(node, Gen(5))
        await first
        with pytest.raises(SearchError, match="within the 5 tokens"):
            pool.fork(node, 1, at=6)
        with pytest.raises(SearchError, match="no scorer 'taste'; there are prm, confidence"):
            await pool.score(node, scorer="taste")
        pool.release(node)
        with pytest.raises(DeadPathError, match="cancelled or released"):
            await pool.extend(node, Gen(5))
        with pytest.raises(DeadPathError, match="never was"):
            pool.stats(Node(0, ((9, -1),)))
        with pytest.raises(DeadPathError, match="query 5 never began"):
            pool.fork(Node(5), 0)
        pool.close(0)

    drive(llm, work)


def test_a_full_context_ends_a_path(llm: LLM):
    async def work(pool: EnginePool) -> None:
        root = pool.root(ids(llm), query=0, seed=0)
        node = pool.fork(root, 0)
        step = await pool.extend(node, Gen(10_000, temperature=100.0))
        while step.reason != "length":  # a random text may end before
            node = pool.fork(node, 0)
            step = await pool.extend(node, Gen(10_000, temperature=100.0))
        assert len(ids(llm)) + pool.stats(node).n_tokens == llm.max_model_len
        assert (await pool.extend(node, Gen(5))).tokens == ()
        pool.close(0)

    drive(llm, work)


def test_shut_down_in_the_middle_of_a_search():
    async def work(llm: LLM) -> None:
        pool = llm.searches.pool()
        root = pool.root(ids(llm), query=0, seed=0)
        waits = [pool.extend(pool.fork(root, i), Gen(200)) for i in range(8)]
        await asyncio.sleep(0.01)
        await asyncio.to_thread(llm.shutdown)
        done = await asyncio.wait_for(asyncio.gather(*waits, return_exceptions=True), 10)
        assert all(isinstance(end, SearchError) for end in done)
        assert pool.close(0).calls == 8

    llm = LLM(MODEL, progress=False, max_num_batched_tokens=64)
    asyncio.run(work(llm))
    gc.collect()


@pytest.mark.slow
def test_experts_of_a_path_are_those_of_a_forward_pass():
    """Bits of every layer, for the token before each one that was drawn."""

    async def work(pool: EnginePool) -> tuple[list[int], Any]:
        root = pool.root(ids(llm), query=0, seed=0)
        nodes = [pool.fork(root, i) for i in range(3)]
        await asyncio.gather(*[pool.extend(node, Gen(12)) for node in nodes])
        half = pool.fork(nodes[1], 0, at=5)
        await pool.extend(half, Gen(4))
        found = pool.stats(half)
        pool.close(0)
        return [*ids(llm), *found.tokens], found.route_sketch

    with LLM(
        MODEL, progress=False, enable_return_routed_experts=True, max_num_batched_tokens=64
    ) as llm:
        llm.wait_until_warm()
        tokens, sketch = drive(llm, work)
        want = _routes(llm, tokens)
    assert len(sketch) == len(tokens) - len(ids_of := tokens[: -len(sketch)])
    assert [list(row) for row in sketch] == want[len(ids_of) - 1 : -1]


def _routes(llm: LLM, tokens: list[int]) -> list[list[int]]:
    """Masks [tokens, layers] by the model's plain forward pass."""
    seen: dict[int, np.ndarray] = {}

    def record(kv: Any, layer: Any, router: Any, scores: Any, ids: Any) -> Any:
        seen[int(layer)] = np.asarray(ids)
        return kv

    batch = jnp.asarray(tokens)[None]
    at = jnp.arange(len(tokens))[None]
    packed = Batch(batch, batch, batch, jnp.ones_like(batch), at)
    plain = training_ops(packed, jnp.float32, num_experts=4)
    with jax.disable_jit():
        ops = replace(plain, record=record, layers="indexed")
        llm._family.forward(llm.model_config, llm.params, batch, at, ops, None)
    masks = [np.bitwise_or.reduce(1 << seen[layer], 1) for layer in sorted(seen)]
    return np.stack(masks, 1).tolist()
