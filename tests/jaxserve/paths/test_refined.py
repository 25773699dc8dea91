"""Tokens refined by several routings, on the real engine: what stays, and what it costs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import LLM
from jaxserve.errors import ConfigError
from jaxserve.paths.pool import EnginePool
from jaxserve.protocol import Cancelled, Gen, Ledger, Node, PathStats, Prio, RouteNoise, SearchError
from jaxserve.train.data import Batch
from jaxserve.train.loss import training_ops
from tests.jaxserve.paths.driving import PROMPT, drive, ids

MODELS = Path(__file__).parents[3] / "models"
SMALL: dict[str, Any] = {"max_num_seqs": 16, "max_num_batched_tokens": 32, "progress": False}
STRONG = RouteNoise(K=4, tau=2.0, reuse=1.0, mix=0.4, entropy_gate=0.0, spared=0)
STILL = replace(STRONG, tau=0.0, reuse=0.0)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(MODELS / "modchain-moe", enable_route_noise=True, num_pages=96, **SMALL) as llm:
        llm.wait_until_warm()
        yield llm


async def grown(
    pool: EnginePool,
    prompt: list[int],
    routes: list[RouteNoise | None],
    *,
    seed: int = 3,
    cut: int = 30,
    count: int = 30,
    temperature: float = 1.0,
) -> list[PathStats]:
    """Paths of one prompt, one for each of the routes, grown side by side."""
    query = len(pool._queries)
    root = pool.root(prompt, query=query, seed=seed)
    nodes = [pool.fork(root, i) for i in range(len(routes))]

    async def grow(node: Node, route: RouteNoise | None) -> None:
        g = Gen(cut, temperature, route=route)
        while pool.stats(node).n_tokens < count and not pool.stats(node).finished:
            await pool.extend(node, g)

    try:
        await asyncio.gather(*map(grow, nodes, routes))
        return [pool.stats(node) for node in nodes]
    finally:
        pool.close(query)


def test_one_routing_is_plain_decoding_to_the_bit(llm: LLM):
    async def work(pool: EnginePool) -> None:
        plain = await grown(pool, ids(llm), [None] * 4)
        once = await grown(pool, ids(llm), [RouteNoise(K=1)] * 4)
        beside = await grown(pool, ids(llm), [None, STRONG, RouteNoise(K=1), None])
        assert once == plain
        assert [beside[i] for i in (0, 2, 3)] == [plain[i] for i in (0, 2, 3)]
        assert beside[1] != plain[1]
        assert pool.ledger(1).effective == 0

    drive(llm, work)


def test_routings_without_noise_change_no_token(llm: LLM):
    async def work(pool: EnginePool) -> None:
        plain = await grown(pool, ids(llm), [None] * 6)
        still = await grown(pool, ids(llm), [STILL] * 6)
        for a, b in zip(plain, still, strict=True):
            assert a.tokens == b.tokens
            for name in ("logprobs", "entropies", "margins", "confidences"):
                np.testing.assert_allclose(getattr(a, name), getattr(b, name), atol=2e-5)
        assert pool.ledger(1).effective == 3 * sum(p.n_tokens for p in still)

    drive(llm, work)


def test_a_refined_child_depends_on_its_prefix_its_index_and_the_seed_alone(llm: LLM):
    async def work(pool: EnginePool) -> None:
        prompt, other = ids(llm), ids(llm, "3 7 11 2 20 :")
        alone = [(await grown(pool, prompt, [STRONG]))[0]]
        company = asyncio.gather(*[grown(pool, other, [None, STRONG], seed=s) for s in range(5)])
        among = await grown(pool, prompt, [STRONG, None, replace(STRONG, K=7)])
        cut = await grown(pool, prompt, [STRONG], cut=6)
        await company
        assert alone[0] == among[0] == cut[0]
        assert (await grown(pool, prompt, [STRONG], seed=4))[0] != alone[0]
        assert (await grown(pool, prompt, [None]))[0] != alone[0]

    drive(llm, work)


@pytest.mark.parametrize("route", [STRONG, replace(STRONG, spared=1), replace(STRONG, mix=5.0)])
def test_a_refined_token_is_what_plain_arithmetic_makes_of_it(llm: LLM, route: RouteNoise):
    """Against whole forward passes without a cache, in which the last token alone is disturbed."""

    prompts = [ids(llm), (5 * ids(llm))[:32], (6 * ids(llm))[:33]]  # pages are of 32

    async def work(pool: EnginePool) -> list[PathStats]:
        return [(await grown(pool, p, [route], cut=1, count=1))[0] for p in prompts]

    for prefix, found in zip(prompts, drive(llm, work), strict=True):
        p = _mixture(llm, prefix, route, seed=words_of(3))
        token = found.tokens[0]
        assert found.logprobs[0] == pytest.approx(np.log(p[token]), abs=1e-4)
        assert found.entropies[0] == pytest.approx(-np.sum(p * np.log(p)), abs=1e-4)
        plain = _mixture(llm, prefix, RouteNoise(K=1), seed=words_of(3))
        assert np.abs(p - plain).max() > 1e-3, "the test would not tell"


def words_of(seed: int) -> tuple[int, int]:
    from jaxserve.paths.records import words_of

    return words_of(seed, ((0, -1),))


def _mixture(llm: LLM, tokens: list[int], route: RouteNoise, seed: tuple[int, int]) -> np.ndarray:
    """The probabilities [V] of the next token, pass by pass in numpy."""
    key = jax.random.wrap_key_data(jnp.array(seed, jnp.uint32))
    used = np.zeros((3, 4), bool)
    passes = list[np.ndarray]()
    for j in range(route.K):
        noise = np.zeros((3, 4), np.float32)
        for layer in range(route.spared, 3 - route.spared) if j else ():
            own = key
            for number in (len(tokens), j, layer):
                own = jax.random.fold_in(own, number)
            noise[layer] = route.tau * np.asarray(jax.random.gumbel(own, (4,)))
            noise[layer] -= route.reuse * used[layer]
        model = llm._family, llm.model_config, llm.params
        z, asked = map(np.asarray, _pass(*model, jnp.array(tokens), noise))
        used[np.arange(3)[:, None], asked] = True
        passes.append(np.exp(z - z.max()) / np.exp(z - z.max()).sum())
    sure = np.array([-np.log(np.sort(p)[-8:]).mean() for p in passes]) / route.mix
    weights = np.exp(sure - sure.max()) / np.exp(sure - sure.max()).sum()
    return weights @ np.array(passes)


@partial(jax.jit, static_argnums=(0, 1))
def _pass(family: Any, cfg: Any, params: Any, tokens: Any, noise: Any) -> tuple[Any, Any]:
    """Logits [V] behind the last token, whose routers hear noise [L, E], and its experts [L, A]."""

    def disturb(kv: Any, layer: Any, scores: Any) -> Any:
        return jnp.zeros_like(scores).at[-1].set(noise[layer])

    def record(kv: Any, layer: Any, router: Any, scores: Any, ids: Any) -> Any:
        return kv.at[layer].set(ids[-1])

    batch, at = tokens[None], jnp.arange(len(tokens))[None]
    packed = Batch(batch, batch, batch, jnp.ones_like(batch), at)
    ops = replace(training_ops(packed, jnp.float32, num_experts=4), layers="indexed")
    ops = replace(ops, record=record, disturb=disturb)
    asked = jnp.zeros((3, 2), jnp.int32)
    hidden, asked = family.forward(cfg, params, batch, at, ops, asked)
    return family.logits(cfg, params, hidden[0, -1:], ops)[0], asked


def test_the_cache_holds_what_the_plain_pass_wrote_whatever_the_routings(llm: LLM):
    async def work(pool: EnginePool) -> None:
        held = set[int]()
        for query, K in enumerate((2, 9)):
            root = pool.root(ids(llm), query=query, seed=3)
            node, count = pool.fork(root, 0), 45
            free = pool.capacity().free_pages
            while pool.stats(node).n_tokens < count:
                await pool.extend(node, Gen(9, 5.0, route=replace(STRONG, K=K)))
            llm._loop.call(lambda engine: None)
            held.add(free - pool.capacity().free_pages)
            tokens = [*ids(llm), *pool.stats(node).tokens]
            refined = _keys(llm, pool, node, len(tokens) - 1)
            read = pool.root(tokens, query=10 + query, seed=0)
            fork = pool.fork(read, 0)
            await pool.extend(fork, Gen(1))
            plain = _keys(llm, pool, fork, len(tokens) - 1)
            np.testing.assert_allclose(refined, plain, atol=1e-5)
            pool.close(query)
            pool.close(10 + query)
        assert len(held) == 1, "a path takes no page more, however many routings"

    drive(llm, work)


def _keys(llm: LLM, pool: EnginePool, node: Node, count: int) -> np.ndarray:
    """Keys of the first tokens of a path at rest [L, count, K, H], computed by itself."""
    path = pool._record(node).path
    pages, size = np.array(path.pages), llm.plan.page_size
    k = llm._loop.call(lambda engine: np.asarray(engine.runner.kv.k)[:, pages])
    assert len(pages) * size >= count
    return np.swapaxes(k, 2, 3).reshape(k.shape[0], -1, k.shape[2], k.shape[4])[:, :count]


def test_the_ledger_counts_what_the_gate_lets_in(llm: LLM):
    async def work(pool: EnginePool) -> None:
        (plain,) = await grown(pool, ids(llm), [None], count=40)
        gate = 0.2
        (still,) = await grown(pool, ids(llm), [replace(STILL, entropy_gate=gate)], count=40)
        assert still.tokens == plain.tokens
        let_in = sum(e > gate for e in plain.entropies)
        assert 0 < let_in < plain.n_tokens
        assert pool.ledger(1).effective == 3 * let_in
        assert pool.ledger(1).committed == plain.n_tokens

    drive(llm, work)


def test_cancelling_and_promoting_refined_paths(llm: LLM):
    async def work(pool: EnginePool) -> None:
        root = pool.root(ids(llm), query=0, seed=3)
        nodes = [pool.fork(root, i) for i in range(24)]  # more than there are rows
        prio = [Prio.SPEC if i % 2 else Prio.COMMIT for i in range(24)]
        waits = [
            pool.extend(n, Gen(200, 0.5, route=STRONG), prio=p)
            for n, p in zip(nodes, prio, strict=True)
        ]
        llm._loop.call(lambda engine: None)  # they run; nothing of them can have come back
        pool.promote(nodes[1])
        pool.cancel(nodes[2])
        pool.cancel(nodes[23])
        done = await asyncio.gather(*waits, return_exceptions=True)
        assert [i for i, end in enumerate(done) if isinstance(end, Cancelled)] == [2, 23]
        assert sum(isinstance(end, BaseException) for end in done) == 2
        kept = [pool.stats(n) for n in nodes[:2]]
        pool.close(0)
        alone = pool.root(ids(llm), query=1, seed=3)
        for i, stats in enumerate(kept):
            again = pool.fork(alone, i)
            await pool.extend(again, Gen(200, 0.5, route=STRONG))
            assert pool.stats(again) == stats
        pool.close(1)

    drive(llm, work)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_no_page_leaks_with_refined_and_plain_rows(llm: LLM, seed: int):
    ledger = fuzz(llm, seed, 400)
    assert ledger.generated > 100 and ledger.effective > 0
    assert llm.stats().num_free_pages == 96


def test_no_page_leaks_in_a_short_run(llm: LLM):
    ledger = fuzz(llm, 17, 60)
    assert ledger.generated > 15 and ledger.effective > 0
    assert llm.stats().num_free_pages == 96


def fuzz(llm: LLM, seed: int, operations: int) -> Ledger:
    """Many paths on 96 pages, some of them refined, forked, promoted and given up at random."""
    rng = Random(seed)
    routes = [None, None, STRONG, STILL, RouteNoise(K=6, entropy_gate=0.2)]

    async def work(pool: EnginePool) -> Ledger:
        root = pool.root(ids(llm), query=0, seed=seed)
        nodes, busy = [pool.fork(root, i) for i in range(4)], dict[Node, Any]()
        for i in range(operations):
            idle = [n for n in nodes if n not in busy or busy[n].done()]
            match rng.choice(("extend", "extend", "extend", "fork", "cancel", "promote", "wait")):
                case "extend" if idle:
                    g = Gen(rng.randint(1, 12), 2.0, route=rng.choice(routes))
                    busy[n] = pool.extend(n := rng.choice(idle), g, prio=rng.choice(list(Prio)))
                case "fork":
                    nodes.append(pool.fork(rng.choice(nodes), 100 + i))
                case "cancel" if len(nodes) > 6:
                    pool.cancel(n := rng.choice(nodes), subtree=False)
                    nodes.remove(n)
                case "promote":
                    pool.promote(rng.choice(nodes))
                case _:
                    await asyncio.sleep(0.002)
        await asyncio.gather(*busy.values(), return_exceptions=True)
        return pool.close(0)

    return drive(llm, work)


def test_who_cannot_refine_says_what_to_do(llm: LLM):
    async def with_too_many_spared(pool: EnginePool) -> None:
        with pytest.raises(SearchError, match=r"none of the model's 3 layers .*most is 1"):
            await grown(pool, ids(llm), [RouteNoise(spared=2)])

    drive(llm, with_too_many_spared)
    for settings, why in (
        ({"K": 0}, "K must be a whole number, 1 to 64"), ({"K": 2.5}, "K must be"),
        ({"K": 65}, "K must be"), ({"tau": -0.1}, "tau must be at least 0"),
        ({"tau": float("nan")}, "tau must be"), ({"mix": 0.0}, "mix must be above 0"),
        ({"spared": -1}, "spared must be"), ({"entropy_gate": float("inf")}, "entropy_gate"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=why):
            RouteNoise(**settings)


@pytest.mark.parametrize(
    ("model", "remedy"),
    [("recall-dense", "has no experts.*leave route out"), ("modchain-moe", "enable_route_noise")],
)
def test_engines_that_do_not_refine(model: str, remedy: str):
    async def work(pool: EnginePool) -> None:
        with pytest.raises(SearchError, match=remedy):
            await grown(pool, [3, 4, 5], [RouteNoise(K=2)])
        assert (await grown(pool, [3, 4, 5], [RouteNoise(K=1)], count=2))[0].n_tokens >= 1

    with LLM(MODELS / model, **SMALL) as llm:
        llm.wait_until_warm()
        assert not any(kind == "refine" for kind, _ in llm.plan.programs)
        assert llm.plan.num_copies == 0
        drive(llm, work)


def test_a_dense_model_is_refused_at_the_start():
    with pytest.raises(ConfigError, match="enable_route_noise=True, and the model has no experts"):
        LLM(MODELS / "recall-dense", enable_route_noise=True, **SMALL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("countdown-moe", {}),
        ("countdown-moe", {"kv_cache_dtype": "int4"}),
        ("modchain-moe", {"kv_cache_dtype": "int8"}),
        ("modchain-moe", {"kernels": "reference"}),
        ("modchain-moe", {"enable_return_routed_experts": True}),
    ],
    ids=["latent", "latent-int4", "int8", "reference", "routes"],
)
def test_routings_without_noise_change_nothing_on_other_caches(model: str, settings: Any):
    """And with noise they change something, though not what is cached."""
    tiny = SMALL | {"max_num_seqs": 4, "max_num_batched_tokens": 8} | settings  # few programs
    with LLM(MODELS / model, enable_route_noise=True, **tiny) as llm:
        llm.wait_until_warm()
        prompt = ids(llm, PROMPT if model == "modchain-moe" else "3 5 7 9 -> 24 :")
        strong = replace(STRONG, tau=5.0)

        async def work(pool: EnginePool) -> None:
            plain = await grown(pool, prompt, [None] * 3, count=40)
            still = await grown(pool, prompt, [STILL] * 3, count=40)
            loud = await grown(pool, prompt, [strong] * 3, count=40)
            for a, b in zip(plain, still, strict=True):
                assert a.tokens == b.tokens and a.route_sketch == b.route_sketch
                np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
            assert any(a.logprobs != b.logprobs for a, b in zip(plain, loud, strict=True))
            spent = pool.ledger(2)
            assert 0 < spent.effective <= 3 * spent.committed
            again = await grown(pool, prompt, [None] * 3, count=40)
            if "kernels" not in settings:  # the reference's rounding depends on who else runs
                assert again == plain
            assert [a.tokens for a in again] == [a.tokens for a in plain]

        drive(llm, work)
