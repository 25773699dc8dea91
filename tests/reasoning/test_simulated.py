"""The simulated pool: a clock that waits, paths that repeat, and pages that come back."""

from __future__ import annotations

import asyncio
import statistics
from random import Random

import pytest

from jaxserve.protocol import (
    Cancelled,
    DeadPathError,
    Failed,
    Gen,
    Prio,
    RouteNoise,
    Scored,
    SearchError,
    StepDone,
)
from reasoning.simulated import STOP, Machine, SimulatedPool, Trees, question, read

LONG = Gen(10_000, stop=(STOP,))
DEEP = Trees(shallowest=20, deepest=20)


def go(coroutine):
    return asyncio.run(coroutine)


async def until(pool, query, count):
    """The first `count` events of a query."""
    events, found = pool.events(query), []
    while len(found) < count:
        found.append(await anext(events))
    await events.aclose()
    return found


def lengths(count, seed=0):
    return [DEEP.made_up(seed, ((i, -1),)).length for i in range(count)]


def test_steps_have_the_lengths_that_were_asked_for():
    found = [Trees(length=50, variation=0.6).made_up(s, ((0, -1),)).length for s in range(2000)]
    assert statistics.mean(found) == pytest.approx(50, rel=0.06)
    assert statistics.stdev(found) / statistics.mean(found) == pytest.approx(0.6, rel=0.15)


def test_scores_go_along_with_paths_and_with_answers():
    trees = Trees(shallowest=3, deepest=3)
    way = ((0, -1), (0, -1))
    pairs = [(trees.made_up(s, way), trees.made_up(s, (*way, (0, -1)))) for s in range(800)]
    assert statistics.correlation(*zip(*[(a.score, b.score) for a, b in pairs], strict=True)) > 0.5
    good = [b.answer == 0 for a, b in pairs if b.score > 0.6]
    bad = [b.answer == 0 for a, b in pairs if b.score < 0.4]
    assert statistics.mean(good) > statistics.mean(bad) + 0.2


def test_paths_end_between_their_depths():
    trees = Trees(shallowest=2, deepest=4)
    ends = set()
    for seed in range(200):
        depth = 1
        while trees.made_up(seed, ((0, -1),) * depth).answer is None:
            depth += 1
        ends.add(depth)
    assert ends == {2, 3, 4}


def test_rows_run_side_by_side():
    async def run():
        pool = SimulatedPool(DEEP, Machine(slots=8))
        root = pool.root((1, 2), query=0, seed=0)
        for i in range(8):
            pool.extend(pool.fork(root, i), LONG)
        events = await until(pool, 0, 8)
        assert [len(e.step.tokens) for e in events] == sorted(lengths(8))
        assert pool.now == max(lengths(8))
        assert pool.close(0).critical_steps == pool.now

    go(run())


def test_what_has_no_slot_waits_and_speculation_waits_longest():
    async def run():
        pool = SimulatedPool(DEEP, Machine(slots=1))
        root = pool.root((1,), query=0, seed=0)
        spec, late = pool.fork(root, 0), pool.fork(root, 1)
        pool.extend(spec, LONG, prio=Prio.SPEC)
        pool.extend(late, LONG)
        first, second = await until(pool, 0, 2)
        assert (first.node, second.node) == (late, spec)
        assert pool.now == sum(lengths(2))

    go(run())


def test_wide_steps_and_scores_take_their_time():
    async def run():
        pool = SimulatedPool(DEEP, Machine(slots=4, ridge=2, score=7))
        root = pool.root((1,), query=0, seed=0)
        nodes = [pool.fork(root, i) for i in range(4)]
        for node in nodes:
            pool.extend(node, LONG)
        await until(pool, 0, 4)
        assert pool.now > max(lengths(4))
        before = pool.now
        value = pool.score(nodes[0])
        (event,) = await until(pool, 0, 1)
        assert event == Scored(nodes[0], "prm", await value)
        assert pool.now == before + 7

    go(run())


def test_several_routings_of_a_token_are_several_rows():
    async def run(K):
        pool = SimulatedPool(DEEP, Machine(slots=4, ridge=2))
        node = pool.fork(pool.root((1,), query=0, seed=0), 0)
        pool.extend(node, Gen(10_000, stop=(STOP,), route=RouteNoise(K)))
        (event,) = await until(pool, 0, 1)
        assert pool.ledger(0).effective == (K - 1) * len(event.step.tokens)
        return event.step.tokens, pool.close(0).critical_steps

    (plain, few), (refined, many) = go(run(1)), go(run(4))
    assert refined == plain and many == 2 * few


def test_promotion_never_starts_work_again():
    async def run():
        pool = SimulatedPool(DEEP, Machine(slots=2))
        root = pool.root((1,), query=0, seed=0)
        node, short = pool.fork(root, 0), pool.fork(root, 1)
        (a,) = lengths(1)
        pool.extend(node, LONG, prio=Prio.SPEC)
        pool.extend(short, Gen(5))
        await until(pool, 0, 1)
        assert pool.ledger(0).spec_waste == 5
        pool.promote(node)
        pool.promote(node)
        assert pool.ledger(0).spec_hit == 5
        assert pool.ledger(0).calls == 2
        await until(pool, 0, 1)
        assert pool.now == a
        ledger = pool.close(0)
        assert (ledger.committed, ledger.spec_hit, ledger.spec_waste) == (a + 5, 5, 0)
        assert pool.ledger(0) == ledger == pool.close(0)

    go(run())


def test_cancelled_paths_say_so_and_are_gone_until_they_are_forked_again():
    async def run():
        pool = SimulatedPool(DEEP, Machine())
        root = pool.root((1,), query=0, seed=0)
        node = pool.fork(root, 0)
        result = pool.extend(node, LONG)
        pool.cancel(node)
        (event,) = await until(pool, 0, 1)
        assert isinstance(event, Failed) and isinstance(event.error, Cancelled)
        with pytest.raises(Cancelled):
            await result
        with pytest.raises(DeadPathError):
            await pool.extend(node, LONG)
        with pytest.raises(DeadPathError):
            await pool.score(node)
        with pytest.raises(DeadPathError):
            pool.promote(node)
        with pytest.raises(DeadPathError):
            await pool.extend(pool.fork(node, 1), LONG)
        again = await asyncio.gather(pool.extend(pool.fork(root, 0), LONG), until(pool, 0, 4))
        assert len(again[0].tokens) == lengths(1)[0], "forked anew, it is the same path"
        pool.close(0)

    go(run())


def test_a_path_that_goes_on_is_still_that_path():
    async def run():
        pool = SimulatedPool(DEEP, Machine())
        root = pool.root((1,), query=0, seed=0)
        node = pool.fork(root, 0)
        for _ in range(2):
            pool.extend(node, LONG)
            await until(pool, 0, 1)
        stats = pool.stats(node)
        child = pool.fork(node, 0, at=3)
        pool.extend(child, LONG)
        await until(pool, 0, 1)
        assert pool.stats(child).tokens[:3] == stats.tokens[:3]
        assert pool.stats(pool.fork(node, 1)).tokens == stats.tokens
        pool.close(0)

    go(run())


def test_whoever_waits_for_nothing_is_told_so():
    async def run():
        pool = SimulatedPool()
        pool.root((1,), query=0, seed=0)
        with pytest.raises(SearchError, match="nothing is on its way"):
            await anext(pool.events(0))

    go(run())


def test_events_end_with_the_query():
    async def run():
        pool = SimulatedPool()
        pool.extend(pool.fork(pool.root((1,), query=0, seed=0), 0), LONG)
        kinds = []
        async for event in pool.events(0):
            kinds.append(type(event))
            pool.close(0)
        assert kinds == [StepDone]

    go(run())


def test_the_clock_waits_for_every_open_query():
    async def run():
        pool = SimulatedPool(DEEP)
        for query in (0, 1):
            pool.extend(pool.fork(pool.root((1,), query=query, seed=query), 0), LONG)

        async def whole(query):
            await until(pool, query, 1)
            pool.close(query)

        waits = asyncio.create_task(whole(0))
        for _ in range(10):
            await asyncio.sleep(0)
        assert pool.now == 0, "query 1 is thinking"
        await until(pool, 1, 1)
        await waits
        assert pool.now > 0

    go(run())


def test_fuzzed_cancellation_leaks_no_page():
    async def run(seed):
        rng, pool = Random(seed), SimulatedPool(Trees(shallowest=3, deepest=6), Machine(4))
        root = pool.root(range(37), query=0, seed=seed)
        nodes, waiting = [root], 0
        for _ in range(60):
            node = rng.choice(nodes)
            child = pool.fork(node, rng.randrange(3))
            match rng.randrange(6):
                case 0:
                    pool.cancel(child, subtree=rng.random() < 0.5)
                case 1:
                    pool.cancel(node) if node != root else None
                case 2 | 3:
                    pool.extend(child, LONG, prio=rng.choice(list(Prio)))
                    nodes.append(child)
                case 4:
                    pool.score(child)
                case _:
                    if pool._rows or pool._scores or pool._queries[0].inbox:
                        await until(pool, 0, 1)
                        waiting += 1
            assert 0 <= pool.capacity().free_pages <= pool.machine.pages
        assert waiting
        ledger = pool.close(0)
        assert ledger.generated == ledger.committed + ledger.spec_waste
        assert pool.capacity().free_pages == pool.machine.pages
        assert pool.capacity().live_rows == 0

    for seed in range(30):
        go(run(seed))


def test_released_pages_come_back_when_no_fork_needs_them():
    async def run():
        pool = SimulatedPool(DEEP, Machine(page=4))
        root = pool.root((1,) * 8, query=0, seed=0)
        node = pool.fork(root, 0)
        pool.extend(node, LONG)
        await until(pool, 0, 1)
        child = pool.fork(node, 0)
        held = pool.machine.pages - pool.capacity().free_pages
        pool.release(node)
        assert pool.machine.pages - pool.capacity().free_pages == held
        pool.cancel(child)
        assert pool.machine.pages - pool.capacity().free_pages == 2
        assert len(pool.stats(node).tokens) == lengths(1)[0], "statistics stay"
        pool.close(0)

    go(run())


def test_answers_are_read_from_the_end():
    assert read((0, 0, 1, 0, 1003, 2)) == 3
    assert read((0, 1)) is None
    assert question(5).seed == 5
