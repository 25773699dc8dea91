"""Whatever the schedule, the texts are the same: over a device of integers, without jax."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxserve.engine.generation import Generation
from jaxserve.engine.runner import Launched
from jaxserve.errors import EngineError, RequestError
from tests.jaxserve.engine.fake_runner import Bench, expected

PAGE_SIZES = st.sampled_from([1, 2, 4, 8])


def prompt(length: int, kind: int = 0) -> list[int]:
    """Prompts of a kind begin alike."""
    return [(7 * i + (kind if i >= 5 else 0)) % 40 for i in range(length)]


class Requests(RuleBasedStateMachine):
    """Requests come, fork, are aborted and finish, in any order, on a pool that is too small."""

    @initialize(
        page_size=PAGE_SIZES,
        tokens=st.integers(24, 80),
        seqs=st.integers(1, 6),
        budget=st.integers(1, 24),
        caching=st.booleans(),
        decode_steps=st.sampled_from([1, 1, 2, 5]),
    )
    def start(
        self, page_size: int, tokens: int, seqs: int, budget: int, caching: bool, decode_steps: int
    ) -> None:
        self.bench = Bench(
            num_pages=-(-tokens // page_size),
            page_size=page_size,
            max_num_seqs=seqs,
            max_tokens=max(budget, seqs),
            prefix_caching=caching,
            decode_steps=decode_steps,
        )
        self.live: list[tuple[Generation, list[int], int, int]] = []

    @rule(
        length=st.integers(1, 20),
        kind=st.integers(0, 2),
        count=st.integers(1, 4),
        n=st.sampled_from([1, 1, 1, 2, 3, 5]),
        seed=st.integers(0, 9),
    )
    def add(self, length: int, kind: int, count: int, n: int, seed: int) -> None:
        asked = prompt(length, kind)
        self.live.append((self.bench.add(asked, count, n=n, seed=seed), asked, count, seed))

    @rule(length=st.integers(1, 20), pooling=st.sampled_from(["last", "mean"]))
    def embed(self, length: int, pooling: str) -> None:
        generation = self.bench.add(prompt(length), pooling=pooling)
        self.live.append((generation, prompt(length), 0, 0))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, len(self.live) - 1), "request")
        generation, asked, count, seed = self.live.pop(at)
        generation.abort()
        generation.abort()
        for output in self.bench.outputs(generation):
            said = expected(asked, count, seed + output.index)
            assert output.token_ids == said[: len(output.token_ids)]
            assert output.finish_reason is not None

    @rule(steps=st.integers(1, 6))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            if self.bench.engine.has_work:
                self.bench.engine.step()

    @rule()
    def finish(self) -> None:
        self.bench.run()
        for generation, asked, count, seed in self.live:
            outputs = self.bench.outputs(generation)
            if count == 0:
                assert generation.embedding is not None
                continue
            for output in outputs:
                assert output.token_ids == expected(asked, count, seed + output.index)
                assert output.finish_reason == "length"
        self.live.clear()

    @rule()
    def forget(self) -> None:
        self.bench.engine.reset_prefix_cache()

    @invariant()
    def nothing_is_counted_twice(self) -> None:
        if not hasattr(self, "bench"):
            return
        scheduler = self.bench.engine.ranks[0]
        queued = [*scheduler.running, *scheduler.waiting]
        assert len({id(seq) for seq in queued}) == len(queued)
        slots = [seq.slot for seq in scheduler.running]
        assert len(set(slots)) == len(slots)
        assert all(seq.slot < 0 and not seq.pages for seq in scheduler.waiting)

    def teardown(self) -> None:
        if hasattr(self, "bench"):
            self.finish()


Requests.TestCase.settings = settings(
    max_examples=150, stateful_step_count=25, deadline=None, derandomize=True
)
TestRequests = Requests.TestCase


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    schedule=st.lists(
        st.tuples(st.integers(0, 5), st.integers(1, 30), st.integers(1, 12), st.integers(1, 3)),
        min_size=1,
        max_size=8,
    ),
    page_size=PAGE_SIZES,
    slack=st.integers(0, 40),
    budget=st.integers(1, 40),
    caching=st.booleans(),
    decode_steps=st.sampled_from([1, 1, 2, 5]),
)
def test_texts_do_not_depend_on_the_schedule(
    schedule: list[tuple[int, int, int, int]],
    page_size: int,
    slack: int,
    budget: int,
    caching: bool,
    decode_steps: int,
):
    """Any arrival times, chunk and page sizes, and pools down to the longest single request."""
    tokens = max(length + count for _, length, count, _ in schedule) + slack
    bench = Bench(
        num_pages=-(-tokens // page_size),
        page_size=page_size,
        max_num_seqs=min(4, budget),
        max_tokens=budget,
        prefix_caching=caching,
        decode_steps=decode_steps,
    )
    generations = []
    for wait, length, count, n in schedule:
        for _ in range(wait):
            bench.engine.step()
        generations.append(bench.add(prompt(length, length % 3), count, n=n))
    bench.run()
    for generation, (_, length, count, _) in zip(generations, schedule, strict=True):
        for output in bench.outputs(generation):
            assert output.token_ids == expected(prompt(length, length % 3), count, output.index)


# ---- what is scheduled ------------------------------------------------------------------------


def test_decodes_ride_in_every_step_while_prompts_fill_the_rest():
    bench = Bench(max_tokens=8, max_num_seqs=4)
    decoding = [bench.add(prompt(2, kind), 20) for kind in range(3)]
    for _ in range(2):
        bench.engine.step()
    bench.add(prompt(30), 4)
    for step in range(7):
        bench.engine.step()
        rows = bench.runner.steps[-1].rows
        counts = {row.seq.generation: row.count for row in rows}
        assert all(counts[generation] == 1 for generation in decoding), step
        if step < 6:
            assert max(counts.values()) == 5, "what decodes leave over is filled with the prompt"
    bench.run()


def test_a_step_is_launched_before_the_one_before_is_read(monkeypatch: pytest.MonkeyPatch):
    bench = Bench()
    generation = bench.add(prompt(3), 5)
    read, launched_before = bench.engine._read, []

    def note(launched: Launched) -> None:
        launched_before.append(len(bench.runner.steps))
        read(launched)

    monkeypatch.setattr(bench.engine, "_read", note)
    bench.run()
    assert bench.outputs(generation)[0].token_ids == expected(prompt(3), 5)
    assert launched_before == [2, 3, 4, 5, 5], "and none in vain: how long it may get is known"


def test_a_stop_token_wastes_one_row_and_no_more():
    said = expected(prompt(3), 10)
    stop = said[3]
    bench = Bench()
    generation = bench.add(prompt(3), 10, stop_ids=frozenset([stop]))
    bench.run()
    (output,) = bench.outputs(generation)
    assert output.token_ids == said[: said.index(stop) + 1]
    assert output.finish_reason == "stop"
    assert len(bench.runner.steps) <= said.index(stop) + 1 + 2


def test_several_tokens_to_a_launch_while_nobody_needs_the_host():
    bench = Bench(decode_steps=4, page_size=4)
    long, short = bench.add(prompt(3, 1), 18), bench.add(prompt(5, 2), 7)
    bench.run()
    assert bench.outputs(long)[0].token_ids == expected(prompt(3, 1), 18)
    assert bench.outputs(short)[0].token_ids == expected(prompt(5, 2), 7)
    repeats = [step.repeats for step in bench.runner.steps]
    assert repeats[0] == 1, "a prompt is no decode"
    assert sum(repeats) == 18, "and none is drawn in vain"
    assert len(repeats) <= 7


def test_a_stop_token_ends_a_launch_of_several():
    said = expected(prompt(3), 20)
    bench = Bench(decode_steps=8)
    generation = bench.add(prompt(3), 20, stop_ids=frozenset([said[4]]))
    bench.run()
    (output,) = bench.outputs(generation)
    assert output.token_ids == said[: said.index(said[4]) + 1]
    assert output.finish_reason == "stop"


def test_preempted_sequences_resume_in_order_of_arrival():
    bench = Bench(num_pages=8, page_size=4, max_num_seqs=4)
    generations = [bench.add(prompt(5, kind), 20) for kind in range(4)]
    bench.run()
    assert bench.engine.stats().num_preemptions > 0
    for kind, generation in enumerate(generations):
        assert bench.outputs(generation)[0].token_ids == expected(prompt(5, kind), 20)
    assert [g.metrics.finished_time for g in generations] == sorted(
        g.metrics.finished_time or 0 for g in generations
    )


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings_whose_last_chunk_is_one_token(pooling: str):
    bench = Bench(max_tokens=8, page_size=4)
    generations = [bench.add(prompt(n), pooling=pooling) for n in (1, 8, 9, 17, 18)]
    bench.run()
    for generation in generations:
        assert generation.result().finished
        assert generation.embedding is not None


def test_overload_finishes():
    """24 requests of 900 tokens in a pool of 4,096."""
    bench = Bench(num_pages=128, page_size=32, max_num_seqs=24, max_tokens=128)
    asked = [([i, *prompt(99)], 800) for i in range(24)]
    generations = [bench.add(*request) for request in asked]
    bench.run(100_000)
    for generation, request in zip(generations, asked, strict=True):
        assert bench.outputs(generation)[0].token_ids == expected(*request)


def test_no_request_is_overtaken_for_ever():
    """A long prompt at the head of the queue is served though short ones keep coming."""
    bench = Bench(num_pages=12, page_size=4, max_num_seqs=4)
    running = [bench.add(prompt(3, k), 30) for k in range(2)]
    bench.engine.step()
    long = bench.add(prompt(40), 4)
    rng = random.Random(0)
    for _ in range(400):
        bench.engine.step()
        if rng.random() < 0.5:
            running.append(bench.add(prompt(rng.randrange(1, 6)), rng.randrange(1, 9)))
        if not long._queue.empty():
            break
    assert not long._queue.empty()
    bench.run()


class Grammar:
    """Permits everything, or nothing."""

    finished = False

    def __init__(self, permits: bool):
        self.permits = permits

    def accept(self, token: int) -> bool:
        return self.permits


@pytest.mark.parametrize("decode_steps", [1, 4])
def test_a_grammar_waits_for_its_token(decode_steps: int):
    """What it permits next is not known before, so it rides in every other step."""
    bench = Bench(decode_steps=decode_steps)
    free = bench.add(prompt(5), 12)
    bound = bench.add(prompt(3), 4, matcher=Grammar(permits=True))
    bench.run()
    assert bench.outputs(bound)[0].token_ids == expected(prompt(3), 4)
    assert bench.outputs(free)[0].token_ids == expected(prompt(5), 12)
    rides = [
        n
        for n, step in enumerate(bench.runner.steps)
        if any(row.seq.generation is bound for row in step.rows)
    ]
    assert rides == [0, 2, 4, 6]


# ---- sharing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("length", range(1, 14))
@pytest.mark.parametrize("caching", [True, False])
def test_siblings_share_their_prompt(length: int, caching: bool):
    bench = Bench(prefix_caching=caching, max_num_seqs=4)
    generation = bench.add(prompt(length), 6, n=3, seed=5)
    bench.run()
    for output in bench.outputs(generation):
        assert output.token_ids == expected(prompt(length), 6, 5 + output.index)
    computed = sum(row.count for step in bench.runner.steps for row in step.rows)
    if length > 1:
        assert computed == length - 1 + 3 * (1 + 5), "the prompt is computed once"


def test_more_siblings_than_slots():
    bench = Bench(max_num_seqs=2)
    generation = bench.add(prompt(9), 6, n=5)
    bench.run()
    for output in bench.outputs(generation):
        assert output.token_ids == expected(prompt(9), 6, output.index)


def test_a_second_run_computes_only_what_is_not_cached():
    bench = Bench(page_size=4)
    for hits in (0, 8):
        generation = bench.add(prompt(10), 3)
        bench.run()
        assert bench.outputs(generation)[0].token_ids == expected(prompt(10), 3)
        assert generation.num_cached_tokens == hits
    assert bench.engine.stats().prefix_cache_hits == 8
    assert bench.engine.stats().prefix_cache_queries == 20


def test_a_whole_prompt_in_the_cache_still_computes_its_last_token():
    bench = Bench(page_size=4)
    for hits in (0, 4, 4):
        generation = bench.add(prompt(8), 3)
        bench.run()
        assert bench.outputs(generation)[0].token_ids == expected(prompt(8), 3)
        assert generation.num_cached_tokens == hits


def test_prompts_that_arrive_together_share_what_is_being_computed():
    bench = Bench(page_size=4, max_tokens=64)
    generations = [bench.add(prompt(20), 3) for _ in range(3)]
    bench.run()
    assert [g.num_cached_tokens for g in generations] == [0, 16, 16]
    for generation in generations:
        assert bench.outputs(generation)[0].token_ids == expected(prompt(20), 3)


def test_another_root_matches_nothing():
    bench = Bench(page_size=4)
    bench.add(prompt(20), 3, root=b"tainted")
    bench.run()
    exact = bench.add(prompt(20), 3)
    bench.run()
    assert exact.num_cached_tokens == 0


@pytest.mark.parametrize("n", [1, 3])
def test_cached_tokens_are_those_of_others(n: int):
    """Neither siblings nor a preemption make a cold prompt look cached."""
    bench = Bench(num_pages=14, page_size=2, max_num_seqs=2, max_tokens=4)
    first = bench.add(prompt(4, 1), 12)
    cold = bench.add(prompt(11, 2), 6, n=n)
    bench.run()
    assert (first.num_cached_tokens, cold.num_cached_tokens) == (0, 4)


def test_outputs_are_cached_too():
    """A conversation's next turn finds the answer of the turn before."""
    bench = Bench(page_size=4)
    first = bench.add(prompt(6), 10)
    bench.run()
    said = bench.outputs(first)[0].token_ids
    second = bench.add([*prompt(6), *said, 3, 1], 4)
    bench.run()
    assert second.num_cached_tokens == 12  # the last token's key was never needed
    assert bench.outputs(second)[0].token_ids == expected([*prompt(6), *said, 3, 1], 4)


# ---- ends -------------------------------------------------------------------------------------


def test_a_failed_step_ends_its_requests_and_nothing_else():
    bench = Bench()
    generation = bench.add(prompt(10), 4, n=2)
    bench.runner.fails = True
    with pytest.raises(RuntimeError, match="on fire"):
        bench.engine.step()
    with pytest.raises(EngineError, match="on fire"):
        bench.outputs(generation)
    bench.runner.fails = False
    again = bench.add(prompt(10), 4)
    bench.run()
    assert again.num_cached_tokens == 0, "what the failed step should have written is not there"
    assert bench.outputs(again)[0].token_ids == expected(prompt(10), 4)


def test_a_request_that_can_never_fit_fails_alone():
    bench = Bench(num_pages=4, page_size=4)
    giant = bench.add(prompt(12), 4)
    bench.engine._requests[giant.request_id][0].tokens += prompt(20)
    small = bench.add(prompt(3), 4)
    bench.run()
    with pytest.raises(EngineError, match="num_pages"):
        bench.outputs(giant)
    assert bench.outputs(small)[0].token_ids == expected(prompt(3), 4)


def test_a_name_in_use_is_refused():
    bench = Bench()
    first = bench.add(prompt(3), 4, request_id="mine")
    second = bench.add(prompt(5), 4, request_id="mine")
    bench.run()
    assert bench.outputs(first)[0].token_ids == expected(prompt(3), 4)
    with pytest.raises(RequestError, match="mine"):
        bench.outputs(second)
    third = bench.add(prompt(5), 4, request_id="mine")
    bench.run()
    assert bench.outputs(third)[0].token_ids == expected(prompt(5), 4)


def test_one_bad_completion_ends_its_siblings():
    """Nobody reads what they would say, so they must not go on saying it."""
    bench = Bench()
    generation = bench.add(prompt(5), 400, n=3)
    for _ in range(4):
        bench.engine.step()
    bench.engine._requests[generation.request_id][1].matcher = Grammar(permits=False)
    bench.run(20)
    with pytest.raises(EngineError, match="grammar"):
        bench.outputs(generation)


def test_aborting_what_is_unknown_does_nothing():
    bench = Bench()
    bench.engine.abort("nobody")
    generation = bench.add(prompt(3), 2)
    bench.run()
    bench.engine.abort(generation.request_id)
    assert bench.outputs(generation)[0].finish_reason == "length"


def test_counters_add_up():
    bench = Bench()
    kept = bench.add(prompt(5), 7, n=2)
    gone = bench.add(prompt(4), 50)
    for _ in range(3):
        bench.engine.step()
    gone.abort()
    bench.run()
    stats = bench.engine.stats()
    assert stats.prompt_tokens_total == 9
    said = [*bench.outputs(kept), *bench.outputs(gone)]
    assert stats.generation_tokens_total == sum(len(output.token_ids) for output in said)
    assert stats.requests_total == {"length": 2, "abort": 1}
    assert stats.num_steps == len(bench.runner.steps)
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert stats.num_free_pages == stats.num_pages
