"""Speculation on the real engine: equality, what a step of b rows costs, and wall time.

Wall time says something where a step of twice the rows takes less than twice as long, and where
the host is quick beside the device; both are printed beside it.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxserve.paths.pool import EnginePool
from jaxserve.paths.scorers import OWN
from jaxserve.protocol import Gen, Node, Question
from reasoning.controllers import CONTROLLERS
from reasoning.controllers.hyper import HyPER
from reasoning.pool import Action, PoolView
from reasoning.result import Budget, Result
from reasoning.speculation import Speculator

EAGER = Speculator(floor=0.0, slack=1.5, unscored=True)
"""Runs ahead wherever it can, worth it or not: equality of searches that guess nothing is none."""
POLICIES = ("mcts", "rebase", "beam", "dvts", "ets", "rest-mcts", "dfs", "best-first")

_queries = itertools.count(1 << 30)


def step_costs(llm: Any, prompt: Sequence[int], repeats: int = 7) -> dict[int, float]:
    """Seconds of an engine step with so many rows that decode: c(b)."""
    return {rows: asyncio.run(_cost(llm, prompt, rows, repeats)) for rows in llm.plan.row_buckets}


async def _cost(llm: Any, prompt: Sequence[int], rows: int, repeats: int) -> float:
    pool, took = llm.searches.pool(), list[float]()
    for query in itertools.islice(_queries, repeats):
        root = pool.root(prompt, query=query, seed=query)
        nodes = [pool.fork(root, i) for i in range(rows)]
        await asyncio.gather(*[pool.extend(node, Gen(1)) for node in nodes])
        steps, began = llm.stats().num_steps, time.perf_counter()
        await asyncio.gather(*[pool.extend(node, Gen(24, temperature=3.0)) for node in nodes])
        took.append((time.perf_counter() - began) / (llm.stats().num_steps - steps))
        pool.close(query)
    return statistics.median(took)


def committed(result: Result) -> tuple[Any, ...]:
    """All that lossless speculation must not change."""
    pieces = tuple((p.node.path, p.tokens) for p in result.tree if p.state != "wasted")
    return result.answer, result.ledger.committed, pieces


def equality(
    llm: Any, questions: Sequence[Question], policies: Sequence[str] = POLICIES
) -> Iterator[dict[str, Any]]:
    """Every policy with and without lossless speculation: trees that differ, and nodes.

    Scores are confidences that arrive after a random while, so that nothing is complete in the
    order in which it was asked for. `speculative_trees` have some token that was made ahead of time
    and asked for later.
    """
    rng = np.random.default_rng(0)

    async def late(pool: EnginePool, node: Node) -> float:
        await asyncio.sleep(rng.uniform(0, 0.003))
        return await OWN["confidence"](pool, node)

    llm.searches.scorers["late"] = late
    for name in policies:
        policy, plain, fast = CONTROLLERS[name](), list[Result](), list[Result]()
        for first in range(0, len(questions), 2):  # more would leave speculation no rows
            part = questions[first : first + 2]
            llm.searches.trust.rows.clear()  # who learns that guesses come to nothing makes none
            plain += llm.search(part, policy, scorer="late")
            fast += llm.search(part, policy, scorer="late", spec=EAGER)
        pairs = [(committed(a), committed(b)) for a, b in zip(plain, fast, strict=True)]
        yield {
            "policy": name,
            "trees": len(pairs),
            "different_trees": sum(a != b for a, b in pairs),
            "nodes": sum(len(a[2]) for a, _ in pairs),
            "different_nodes": sum(len(set(a[2]) ^ set(b[2])) for a, b in pairs),
            "speculative_trees": sum(r.ledger.spec_hit > 0 for r in fast),
            "spec_hit": sum(r.ledger.spec_hit for r in fast),
            "spec_waste": sum(r.ledger.spec_waste for r in fast),
            "committed": sum(r.ledger.committed for r in fast),
        }


def wall_time(
    llm: Any,
    questions: Sequence[Question],
    name: str,
    together: int,
    repeats: int = 10,
    *,
    costs: Mapping[int, float],
    **settings: Any,
) -> dict[str, Any]:
    """The same searches with speculation and without, in turn, so many queries at a time.

    Seconds of the process's processors stand beside those of the wall, which others who share the
    machine lengthen; and beside both what `costs`, as of `step_costs`, permit: the quotient of the
    times that all steps take at their mean number of rows, if the host took none.
    """
    policy = CONTROLLERS[name](**settings)
    runs: dict[bool, list[_Run]] = {False: [], True: []}
    for i in range(-1, repeats):  # the first round warms up, and the measured costs of rows with it
        part = [questions[(i * together + j) % len(questions)] for j in range(together)]
        for fast in (False, True) if i % 2 else (True, False):
            run = _timed(llm, part, policy, Speculator() if fast else None)
            if i >= 0:
                runs[fast].append(run)
    plain, fast = runs[False], runs[True]
    wall = [a.wall / b.wall for a, b in zip(plain, fast, strict=True)]
    cpu = [a.cpu / b.cpu for a, b in zip(plain, fast, strict=True)]
    return {
        "policy": name,
        "queries": together,
        "wall_speedup": statistics.median(wall),
        "wall_interval": median_interval(wall),
        "wall_speedups": [round(r, 3) for r in wall],
        "cpu_speedup": statistics.median(cpu),
        "cpu_interval": median_interval(cpu),
        "steps_speedup": sum(run.steps for run in plain) / sum(run.steps for run in fast),
        "rows": [_rows(arm) for arm in (plain, fast)],
        "permitted_speedup": _at_cost(plain, costs) / _at_cost(fast, costs),
        "seconds": [_middle([run.wall for run in arm]) for arm in (plain, fast)],
        "cpu_seconds": [_middle([run.cpu for run in arm]) for arm in (plain, fast)],
        "per_minute": [60 * together / _middle([r.wall for r in arm]) for arm in (plain, fast)],
        "p50_latency": [_quantile(arm, 0.5) for arm in (plain, fast)],
        "p99_latency": [_quantile(arm, 0.99) for arm in (plain, fast)],
        "p99_seconds": [max(run.wall for run in arm) for arm in (plain, fast)],
        "hit_rate": statistics.mean(rate for run in fast for rate in run.hit_rates),
        "waste_ratio": statistics.mean(ratio for run in fast for ratio in run.wastes),
        "doubles": llm.searches.keeper.capacity().doubles,
        "different": sum(a.found != b.found for a, b in zip(plain, fast, strict=True)),
    }


@dataclass(frozen=True)
class _Run:
    """One batch of queries; lists are by query."""

    wall: float
    cpu: float
    steps: int
    tokens: int
    latencies: list[float]
    hit_rates: list[float]
    wastes: list[float]
    found: list[Any]


def _timed(llm: Any, part: Sequence[Question], policy: Any, spec: Speculator | None) -> _Run:
    before, cpu, began = llm.stats(), time.process_time(), time.perf_counter()
    results = llm.search(part, policy, spec=spec)
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    after, notes = llm.stats(), [result.notes for result in results]
    return _Run(
        wall, cpu, after.num_steps - before.num_steps,
        after.generation_tokens_total - before.generation_tokens_total,
        [n["seconds"] for n in notes],
        [n["hit_rate"] for n in notes], [n["waste_ratio"] for n in notes],
        [committed(result) for result in results],
    )  # fmt: skip


def _rows(runs: Sequence[_Run]) -> float:
    """Of a step, on average."""
    return sum(run.tokens for run in runs) / sum(run.steps for run in runs)


def _at_cost(runs: Sequence[_Run], costs: Mapping[int, float]) -> float:
    """Seconds that the steps of all runs take, by what steps of so many rows cost."""
    sizes = sorted(costs)
    each = np.interp(_rows(runs), sizes, [costs[size] for size in sizes])
    return float(each) * sum(run.steps for run in runs)


def _middle(values: Sequence[float]) -> float:
    return statistics.median(values)


def _quantile(runs: Sequence[_Run], q: float) -> float:
    """Of the latencies of all queries."""
    found = sorted(latency for run in runs for latency in run.latencies)
    return found[min(len(found) - 1, int(q * len(found)))]


def median_interval(values: Sequence[float], draws: int = 10_000) -> list[float]:
    """The 95 % bootstrap interval of a median."""
    rng = np.random.default_rng(0)
    found = np.median(np.array(values)[rng.integers(0, len(values), (draws, len(values)))], 1)
    return [round(float(x), 3) for x in np.quantile(found, [0.025, 0.975])]


@dataclass(frozen=True)
class _Clocked(HyPER):
    """Notes of each decision when it began and ended, and how many paths were live then."""

    decisions: list[tuple[float, float, int]] = field(default_factory=list[Any], compare=False)

    def step(self, view: PoolView) -> Sequence[Action]:
        began = time.perf_counter()
        actions = super().step(view)
        self.decisions.append((began, time.perf_counter(), len(view.live)))
        return actions


def host_share(llm: Any, question: Question, rows: int = 64) -> dict[str, float]:
    """What HyPER's own code costs beside the engine: with so many live paths, nine in ten of them
    at least (`full_share`), and over a whole search, in which they become fewer (`share`).

    It keeps its pool full, whether there is anything new to find or not: no path is given up, so
    that every one is looked at to its end, and another begins where one has ended, until what twice
    as many plain paths of ModChain have is spent.
    """
    everybody = {"floor": -math.inf, "alike": 0, "novelty": 0.0, "safe": 0}
    policy = _Clocked(width=rows, paths=1 << 20, **everybody)
    steps, began = llm.stats().num_steps, time.perf_counter()
    result = llm.search(question, policy, Budget(tokens=70 * rows))
    took, count = time.perf_counter() - began, llm.stats().num_steps - steps
    thought = result.notes["policy_seconds"]
    rounds = [
        (after[0] - before[0], before[1] - before[0])
        for before, after in itertools.pairwise(policy.decisions)
        if after[2] >= 0.9 * rows
    ]
    whole, thinking = map(sum, zip(*rounds, strict=True))
    return {
        "policy_seconds": thought,
        "seconds": took,
        "share": thought / took,
        "full_share": thinking / whole,
        "full_rounds": len(rounds),
        "full_policy_ms": 1e3 * thinking / len(rounds),
        "full_round_ms": 1e3 * whole / len(rounds),
        "steps": count,
        "live": result.ledger.generated / count,
    }


def fork_costs(llm: Any, lengths: Sequence[int], forks: int = 2000) -> dict[int, dict[str, float]]:
    """Microseconds of a fork, and of a fork with its first token, by the length of its parent."""
    return {length: asyncio.run(_fork(llm, length, forks)) for length in lengths}


async def _fork(llm: Any, length: int, forks: int) -> dict[str, float]:
    pool, query = llm.searches.pool(), next(_queries)
    node = pool.fork(pool.root([5] * length, query=query, seed=0), 0)
    await pool.extend(node, Gen(1))
    began = time.perf_counter()
    for i in range(forks):
        pool.fork(node, i)
    forked = time.perf_counter() - began
    await asyncio.gather(*[pool.extend(pool.fork(node, -1 - i), Gen(1)) for i in range(16)])
    took = list[float]()
    for i in range(50):
        began = time.perf_counter()
        await pool.extend(pool.fork(node, forks + i), Gen(1))
        took.append(time.perf_counter() - began)
    pool.close(query)
    return {"fork_us": 1e6 * forked / forks, "token_us": 1e6 * statistics.median(took)}
