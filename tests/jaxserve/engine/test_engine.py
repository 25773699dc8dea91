"""Whatever runs beside a request, and however it is cut up, it says the same: on a real model.

What a request says is fixed by its prompt, its parameters and its seed. Each is therefore run alone
once, without a cache, and then in company: in chunks of any size, on pages of two sizes, on pools
that force preemption, a token or several to a launch, with forks, hits, and neighbours that leave.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve import LLM, SamplingParams
from jaxserve.cache.page_manager import root_key
from jaxserve.engine.generation import Generation
from kernels_pallas import cpu
from tests.jaxserve.engine.engines import Driver, serve
from tests.sparing import sparing

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.9},
    "filtered": {"temperature": 1.3, "top_k": 30, "top_p": 0.9, "min_p": 0.01},
    "penalised": {"temperature": 0.7, "repetition_penalty": 1.3, "presence_penalty": 0.8},
    "greedy and penalised": {"temperature": 0.0, "frequency_penalty": 1.5},
    "biased": {"temperature": 1.0, "logit_bias": {5: 3.0, 300: 2.0}},
    "scored": {"temperature": 0.8, "logprobs": 2, "prompt_logprobs": 1},
    "held": {"temperature": 0.8, "min_tokens": 6},
}
TOLERANCE = 1e-4  # of log-probabilities; tokens are equal


@dataclass(frozen=True)
class Asked:
    """A request, small enough to be drawn and to be remembered."""

    length: int
    kind: str
    n: int = 1
    seed: int = 0
    output: int = 8

    @property
    def prompt(self) -> list[int]:
        """Prompts begin alike, and part after some tokens."""
        ids = np.random.default_rng(0).integers(5, 320, 64)
        ids[11 + self.length % 3 :] += self.length % 3
        return ids[: self.length].clip(max=319).tolist()

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(n=self.n, seed=self.seed, max_tokens=self.output, **KINDS[self.kind])


REQUESTS = st.builds(
    Asked,
    length=st.integers(1, 40),
    kind=st.sampled_from(sorted(KINDS)),
    n=st.sampled_from([1, 1, 1, 2, 3]),
    seed=st.integers(0, 3),
    output=st.integers(6, 12),
)


@dataclass(frozen=True)
class Schedule:
    """When requests come and go, and what the engine may use."""

    requests: tuple[tuple[int, Asked, int | None], ...]  # steps before it; leaves after so many
    budget: int
    seqs: int
    slack: int
    caching: bool
    engine: tuple[int, int]  # page size, decode steps


SCHEDULES = st.builds(
    Schedule,
    requests=st.lists(
        st.tuples(st.integers(0, 4), REQUESTS, st.none() | st.integers(0, 12)),
        min_size=1,
        max_size=6,
    ).map(tuple),
    budget=st.integers(4, 16),
    seqs=st.integers(1, 4),
    slack=st.sampled_from([0, 0, 1, 3, 50]),
    caching=st.booleans(),
    engine=st.sampled_from([(8, 1), (32, 1), (8, 4)]),
)


_served: dict[tuple[str, int, int], LLM] = {}


def served(kernels: str, page_size: int, decode_steps: int = 1) -> LLM:
    """A model with kernels of that name, or with the best and a cache of that type."""
    key = (kernels, page_size, decode_steps)
    if key not in _served:
        kind: dict[str, Any] = {
            "kv_cache_dtype" if kernels.startswith("int") else "kernels": kernels
        }
        _served[key] = serve(page_size=page_size, decode_steps=decode_steps, **kind)
    return _served[key]


@pytest.fixture(scope="module", autouse=True)
def ends() -> Iterator[None]:
    yield
    while _served:
        _served.popitem()[1].shutdown()


@functools.cache
def alone(kernels: str, asked: Asked) -> tuple[Any, Any]:
    """What a request says when nothing else runs: its texts, and log-probabilities."""
    driver = Driver(served(kernels, 8), prefix_caching=False)
    generation = driver.add(asked.prompt, asked.params)
    driver.run()
    return said(generation)


def said(generation: Generation) -> tuple[Any, Any]:
    out = generation.result()
    texts = [(o.token_ids, o.text, o.finish_reason, o.stop_reason) for o in out.outputs]
    scores = [o.logprobs for o in out.outputs], out.prompt_logprobs
    return texts, scores


def assert_close(found: Any, want: Any) -> None:
    """The same structure of log-probabilities, give or take rounding."""
    if isinstance(found, (list, tuple)):
        assert len(found) == len(want)
        for f, w in zip(found, want, strict=True):
            assert_close(f, w)
    elif isinstance(found, dict):
        assert next(iter(found)) == next(iter(want))
        for token in found.keys() & want.keys():
            assert abs(found[token].logprob - want[token].logprob) < TOLERANCE
    else:
        assert found is want is None


def play(kernels: str, schedule: Schedule) -> None:
    """Runs a schedule and holds every text against what its request says alone."""
    llm, page_size = served(kernels, *schedule.engine), schedule.engine[0]
    longest = max(a.length + a.output for _, a, _ in schedule.requests)
    driver = Driver(
        llm,
        budget=schedule.budget,
        num_pages=min(-(-longest // page_size) + schedule.slack, llm.plan.num_pages),
        max_num_seqs=schedule.seqs,
        prefix_caching=schedule.caching,
    )
    running: list[tuple[Generation, Asked, int | None]] = []
    for wait, asked, leaves in schedule.requests:
        for _ in range(wait):
            driver.step()
        running.append((driver.add(asked.prompt, asked.params), asked, leaves))
    for step in range(13):
        for generation, _, leaves in running:
            if leaves == step:
                generation.abort()
        driver.step()
    driver.run()
    for generation, asked, leaves in running:
        texts, scores = said(generation)
        want, want_scores = alone(kernels, asked)
        if leaves is None:
            assert texts == want
            assert_close(scores, want_scores)
        for (ids, _, reason, _), (want_ids, *_) in zip(texts, want, strict=True):
            assert ids == want_ids[: len(ids)]
            assert reason is not None


@settings(max_examples=40, deadline=None, derandomize=True)
@given(SCHEDULES)
def test_company_changes_nothing(schedule: Schedule):
    play("auto", schedule)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@settings(max_examples=400, deadline=None, derandomize=True)
@given(SCHEDULES)
def test_company_changes_nothing_in_many_schedules(schedule: Schedule):
    play("auto", schedule)


@pytest.mark.slow
@pytest.mark.skipif(not cpu.available(), reason="no C++ compiler: these are the kernels above")
@settings(max_examples=60, deadline=None, derandomize=True)
@given(SCHEDULES)
def test_company_changes_nothing_on_plain_xla(schedule: Schedule):
    play("reference", schedule)


@pytest.mark.skipif(not cpu.available(), reason="plain XLA's rounding depends on the batch")
@pytest.mark.parametrize("cache", sparing(["int8", "int4"], "int8"))
@settings(max_examples=12, deadline=None, derandomize=True)
@given(schedule=SCHEDULES)
def test_company_changes_nothing_in_a_rounded_cache(cache: str, schedule: Schedule):
    play(cache, schedule)


# ---- one thing at a time ----------------------------------------------------------------------


def test_completions_have_seeds_of_their_own():
    """Sample i of n is that of any larger n, and the first is the request's own."""
    texts = {n: alone("auto", Asked(9, "sampled", n=n, seed=3))[0] for n in (1, 2, 4)}
    assert texts[1] == texts[2][:1] == texts[4][:1]
    assert texts[2] == texts[4][:2]
    assert len({tuple(ids) for ids, *_ in texts[4]}) == 4
    assert texts[4] != alone("auto", Asked(9, "sampled", n=4, seed=4))[0]


def test_greedy_completions_are_one():
    first, *others = alone("auto", Asked(9, "greedy", n=3))[0]
    assert all(other == first for other in others)


def test_requests_without_a_seed_differ():
    llm = served("auto", 8)
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    first, second = llm.generate([[7, 8, 9]] * 2, params)
    assert first.outputs[0].token_ids != second.outputs[0].token_ids


def test_preemption_was_tested():
    """The smallest pools above do preempt."""
    driver = Driver(served("auto", 8), num_pages=7)
    asked = [Asked(9, "penalised", seed=i, output=40) for i in range(4)]
    generations = [driver.add(a.prompt, a.params) for a in asked]
    driver.run()
    assert driver.engine.stats().num_preemptions >= 2
    for generation, a in zip(generations, asked, strict=True):
        assert said(generation)[0] == alone("auto", a)[0]


def test_hits_change_nothing():
    driver = Driver(served("auto", 8))
    asked = Asked(36, "scored", n=2)
    unscored = Asked(36, "penalised", n=2)
    for a, hits in ((asked, 0), (unscored, 32), (unscored, 32), (asked, 0)):
        generation = driver.add(a.prompt, a.params)
        driver.run()
        assert generation.num_cached_tokens == hits
        texts, scores = said(generation)
        want, want_scores = alone("auto", a)
        assert texts == want
        assert_close(scores, want_scores)


def test_a_tainted_cache_answers_nobody_else():
    llm = served("auto", 8)
    driver = Driver(llm)
    asked = Asked(36, "greedy")
    exact, llm._intake.root = llm._intake.root, root_key("approximate")
    try:
        driver.add(asked.prompt, asked.params)
        driver.run()
    finally:
        llm._intake.root = exact
    generation = driver.add(asked.prompt, asked.params)
    driver.run()
    assert generation.num_cached_tokens == 0
    assert said(generation)[0] == alone("auto", asked)[0]


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings_do_not_depend_on_their_company(pooling: str):
    asked = [Asked(length, "greedy") for length in (1, 7, 8, 9, 33, 40)]

    def embed(driver: Driver, *requests: Asked) -> list[np.ndarray]:
        generations = [driver.add(a.prompt, SamplingParams(), pooling) for a in requests]
        driver.run()
        for generation in generations:
            generation.result()
        found = [generation.embedding for generation in generations]
        return [np.array(f.embedding) for f in found if f is not None]

    alone = [embed(Driver(served("auto", 8)), a)[0] for a in asked]
    driver = Driver(served("auto", 8), budget=5, num_pages=8, max_num_seqs=3)
    noise = [driver.add(a.prompt, SamplingParams(max_tokens=9)) for a in asked[2:5]]
    for found, want in zip(embed(driver, *asked), alone, strict=True):
        np.testing.assert_allclose(found, want, atol=1e-4)
    assert all(generation.result().finished for generation in noise)
    again = embed(driver, *asked)  # now "last" skips what is cached
    np.testing.assert_allclose(np.array(again), np.array(alone), atol=1e-4)
