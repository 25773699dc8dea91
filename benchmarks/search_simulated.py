"""What speculation saves, on simulated engines: `python -m benchmarks.search_simulated`.

Nothing is timed: the clock counts engine steps, so the figures are the same on every machine. A
batch of queries runs with speculation and without on engines that are otherwise alike; where the
mode is lossless, every tree and answer is checked to be the same. Arms add up: T1 speculates within
each query, T2 shares rows among queries, T3 stops once no vote can change the answer. `limit` is
the latency ratio that perfect foresight would have reached without T3.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.records import record, write
from reasoning.controllers.beam import Beam
from reasoning.controllers.dvts import Dvts
from reasoning.controllers.mcts import Mcts
from reasoning.controllers.rebase import Rebase
from reasoning.controllers.rest_mcts import RestMcts
from reasoning.result import Result
from reasoning.search import run_search
from reasoning.simulated import Machine, SimulatedPool, Trees, question
from reasoning.speculation import Coordinator, Speculator
from reasoning.tree import SearchPolicy

FIXED, RAGGED = Trees(shallowest=5, deepest=5), Trees(shallowest=6, deepest=8)

POLICIES: dict[str, tuple[SearchPolicy, int, Trees]] = {
    "mcts": (Mcts(), 4, FIXED),
    "rest-mcts": (RestMcts(), 4, FIXED),
    "rebase-8": (Rebase(8), 8, RAGGED),
    "rebase-16": (Rebase(16), 16, RAGGED),
    "beam": (Beam(), 16, RAGGED),
    "dvts": (Dvts(), 16, RAGGED),
}
"""Each with the rows that it fills by itself, and the trees it is tried on."""

ARMS = ("T1", "T1+T2", "T1+T2+T3")


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        slots: rows of the engine, over those that all queries fill by themselves.
        score: engine steps until a score is there.
        linear: rows beyond those that the queries fill by themselves cost time in proportion.
        variation: of the lengths of steps.
    """

    policy: str
    slots: float = 2.0
    score: float = 0.0
    queries: int = 4
    arm: str = "T1+T2"
    variation: float = 0.6
    linear: bool = False

    def spec(self) -> Speculator:
        stop = "safe" if "T3" in self.arm else "never"
        if self.score < 4:
            return Speculator(stop=stop)
        # Scores that take long are not waited for; guesses are enough then without any slack.
        return Speculator(stop=stop, unscored=True, slack=1.0)


def compare(
    case: Case, batches: int, spec: Speculator | None = None, first: int = 0
) -> dict[str, float]:
    """Speculative searches against sequential ones, over batches of queries from `first` on."""
    policy, rows, trees = POLICIES[case.policy]
    rows *= case.queries
    trees = replace(trees, variation=case.variation)
    machine = Machine(
        max(1, round(case.slots * rows)), ridge=rows if case.linear else None, score=case.score
    )
    spec = spec or case.spec()
    shared = Coordinator()
    own = [shared if "T2" in case.arm else Coordinator() for _ in range(case.queries)]
    pairs = list[tuple[Result, Result]]()
    spans = [0.0, 0.0]
    for batch in range(first, first + batches):
        seeds = range(batch * case.queries, (batch + 1) * case.queries)
        plain, span = _run(policy, SimulatedPool(trees, machine), seeds, None, own)
        fast, new_span = _run(policy, SimulatedPool(trees, machine), seeds, spec, own)
        spans = [spans[0] + span, spans[1] + new_span]
        pairs += zip(plain, fast, strict=True)
    _check(pairs, spec)
    return {"makespan": spans[0] / spans[1], **_figures(pairs, case.score)}


def _run(
    policy: SearchPolicy,
    pool: SimulatedPool,
    seeds: Sequence[int],
    spec: Speculator | None,
    coordinators: Sequence[Coordinator],
) -> tuple[list[Result], float]:
    async def all_of() -> list[Result]:
        searches = (
            run_search(policy, pool, question(seed), spec=spec, coordinator=coordinator)
            for seed, coordinator in zip(seeds, coordinators, strict=True)
        )
        return await asyncio.gather(*searches)

    return asyncio.run(all_of()), pool.now


def _check(pairs: Sequence[tuple[Result, Result]], spec: Speculator) -> None:
    """Lossless is what it says."""
    for plain, fast in pairs:
        if spec.mode == "lossless" and plain.answer != fast.answer:
            raise AssertionError(f"{plain.controller}: speculation changed an answer")
        if spec.mode == "lossless" and spec.stop == "never" and _tree(plain) != _tree(fast):
            raise AssertionError(f"{plain.controller}: speculation changed a tree")


def _tree(result: Result) -> list[Any]:
    pieces = (p for p in result.tree if p.state != "wasted")
    return [result.ledger.committed, *((p.node.path, p.tokens, p.score) for p in pieces)]


def _longest(result: Result, score: float) -> float:
    """Engine steps of the slowest path: no search that comes to this tree can be quicker."""
    ends = dict[Any, float]()
    for piece in result.tree:
        before = ends.get(piece.parent, 0.0) if piece.parent else 0.0
        ends[piece.node] = before + len(piece.tokens)
    return max(ends.values()) + score


def _figures(pairs: Sequence[tuple[Result, Result]], score: float) -> dict[str, float]:
    fast = [new for _, new in pairs]
    committed = sum(r.ledger.committed for r in fast)
    speculated = sum(r.notes["speculated"] for r in fast)
    latencies = [sorted(pair[i].ledger.critical_steps for pair in pairs) for i in (0, 1)]
    late = [found[min(len(found) - 1, int(0.99 * len(found)))] for found in latencies]
    return {
        "latency": sum(latencies[0]) / sum(latencies[1]),
        "p99": late[0] / late[1],
        "limit": sum(latencies[0]) / sum(_longest(plain, score) for plain, _ in pairs),
        "hit_rate": sum(r.notes["hits"] for r in fast) / max(speculated, 1),
        "waste_ratio": sum(r.ledger.spec_waste for r in fast) / committed,
        "policy_ms": 1000 * sum(r.notes["policy_seconds"] for r in fast) / len(fast),
    }


def cases(policies: Sequence[str], arms: Sequence[str], full: bool) -> Iterator[Case]:
    """One setting at a time changes from the middle of them all; or every combination."""
    slots, scores, queries = (1.0, 1.5, 2.0, 4.0), (0.0, 4.0, 32.0), (1, 4, 8, 32)
    middle = Case("")
    if full:
        settings = list(itertools.product(slots, scores, queries))
    else:
        settings = [(s, middle.score, middle.queries) for s in slots]
        settings += [(middle.slots, s, middle.queries) for s in scores[1:]]
        settings += [(middle.slots, middle.score, q) for q in queries if q != middle.queries]
    for name, arm, (slot, score, count) in itertools.product(policies, arms, settings):
        yield Case(name, slot, score, count, arm)


def goals() -> dict[str, tuple[Case, Speculator]]:
    """The settings for which figures are promised (section 6): no early termination."""
    return {
        "mcts-10": (Case("mcts", slots=8.0, queries=1, arm="T1"), Speculator()),
        "mcts-10 x4": (Case("mcts", slots=8.0), Speculator()),
        "rebase-8": (Case("rebase-8", queries=1, arm="T1"), Speculator()),
        "rebase-16": (Case("rebase-16", queries=1, arm="T1"), Speculator()),
        "rebase-16 x4": (Case("rebase-16"), Speculator()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=["mcts", "rebase-16"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--queries", type=int, default=4, help="least number for each comparison")
    parser.add_argument("--full", action="store_true", help="every combination of settings")
    parser.add_argument("--goals", action="store_true", help="only what is promised")
    args = parser.parse_args()
    chosen = [(case, None) for case in cases(args.policies, args.arms, args.full)]
    for case, spec in goals().values() if args.goals else chosen:
        found = compare(case, -(-args.queries // case.queries), spec)
        makespan = found.pop("makespan")
        rounded = {key: round(value, 3) for key, value in found.items()}
        write(
            record("search_simulated", case.policy, [makespan], "makespan ratio")
            | asdict(case)
            | rounded
        )


if __name__ == "__main__":
    main()
