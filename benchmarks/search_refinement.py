"""Token-level refinement against plain sampling: `python -m benchmarks.search_refinement`.

Arms sample the same paths of the same problems, with the same random numbers, and differ in how a
token is drawn: plainly, at another temperature, or from several routings (HyPER's SingleToken).
Answers are voted on. Passes beyond the first of a token count as tokens, so a refined arm meets
plain sampling with more paths. One JSON line for each arm and each comparison, on the dev split.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.reason_eval import task_of
from benchmarks.records import machine
from benchmarks.search_methods import TOGETHER, Field
from benchmarks.search_methods import runs as method
from benchmarks.search_stats import Difference, Runs, bootstrap, compare, curve, difference
from jaxserve.protocol import Gen, Question, RouteNoise
from reasoning.answers import Candidate, vote
from reasoning.controllers.hyper_scores import Scores
from reasoning.result import next_query

MODEL = Path("models/modchain-moe")
BUDGETS = (1, 2, 4, 8, 16, 32)
"""Paths that are voted on."""

MATCHED = (4, 8, 16)
"""Paths of plain sampling, at whose tokens arms are compared."""

ARMS: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "temperature .7": {"temperature": 0.7},
    "temperature 1.3": {"temperature": 1.3},
    "refined": {"route": RouteNoise()},
    "refined, all layers": {"route": RouteNoise(spared=0)},
    "refined, strong": {"route": RouteNoise(tau=1.0, reuse=0.5, entropy_gate=0.1, spared=0)},
    "refined, even mix": {"route": RouteNoise(tau=0.5, mix=10.0, spared=0)},
    "refined, every token": {"route": RouteNoise(entropy_gate=0.0, spared=0)},
}

SEARCHES: Mapping[str, Mapping[str, Any]] = {
    "hyper": {},
    "hyper, refining": {"route": RouteNoise(spared=0)},
    "hyper, refining often": {
        "route": RouteNoise(spared=0), "scores": Scores(gate=0.5, hysteresis=0.0)
    },
}  # fmt: skip


async def sampled(pool: Any, question: Question, gen: Gen, count: int) -> list[tuple[Any, int]]:
    """Answers of the first so many paths, and what each cost, extra passes included."""
    query = next_query()
    root = pool.root(question.prompt, query=query, seed=question.seed)
    try:
        nodes = [pool.fork(root, i) for i in range(count)]
        steps = await asyncio.gather(*[pool.extend(node, gen) for node in nodes])
        return [(question.read(s.tokens), len(s.tokens) + s.passes) for s in steps]
    finally:
        pool.close(query)


def runs(field: Field, how: Mapping[str, Any], count: int) -> tuple[Runs, Runs]:
    """An arm: votes of its first paths under every budget, and its single paths on average."""
    asked = list(field.questions())

    async def some(questions: Sequence[Question]) -> list[list[tuple[Any, int]]]:
        pool = field.llm.searches.pool()
        work = [sampled(pool, q, Gen(q.max_tokens, **how), count) for q in questions]
        return await asyncio.gather(*work)

    shape = len(field.problems), len(field.seeds)
    right, tokens = np.zeros((len(BUDGETS), *shape)), np.zeros((len(BUDGETS), *shape))
    alone, length = np.zeros((1, *shape)), np.zeros((1, *shape))
    for first in range(0, len(asked), TOGETHER):
        part = asked[first : first + TOGETHER]
        for (p, s, _), paths in zip(part, asyncio.run(some([q for *_, q in part])), strict=True):
            problem = field.problems[p]
            for b, n in enumerate(BUDGETS):
                answer = vote(Candidate(answer) for answer, _ in paths[:n]).answer
                right[b, p, s] = field.is_right(problem, answer)
                tokens[b, p, s] = sum(cost for _, cost in paths[:n])
            alone[0, p, s] = np.mean([field.is_right(problem, answer) for answer, _ in paths])
            length[0, p, s] = np.mean([cost for _, cost in paths])
    return Runs(right, tokens), Runs(alone, length)


def said(d: Difference) -> dict[str, Any]:
    return {"value": round(d.value, 4), "interval": [round(d.low, 4), round(d.high, 4)], "p": d.p}


def figures(runs: Runs) -> dict[str, Any]:
    """Mean tokens and accuracy under each budget."""
    tokens, right = (values.tolist() for values in curve(runs))
    return {"tokens": [round(t, 1) for t in tokens], "accuracy": [round(r, 4) for r in right]}


def against(methods: Mapping[str, Runs], first: str, tokens: Sequence[float]) -> None:
    """Says what every other method has over the first one, at matched tokens."""
    for name, tests in compare(methods, first, tokens).items():
        ours = {  # `compare` says what the first one has
            what: said(Difference(-d.value, -d.high, -d.low, d.p)) for what, d in tests.items()
        }
        print(json.dumps({"over": first, "arm": name, **ours}), flush=True)


def measure(field: Field, arms: Sequence[str]) -> None:
    votes, alone = dict[str, Runs](), dict[str, Runs]()
    for name in dict.fromkeys(["plain", *arms]):
        votes[name], alone[name] = runs(field, ARMS[name], max(BUDGETS))
        path = round(float(alone[name].right.mean()), 4)
        print(json.dumps({"arm": name, "a path": path, **figures(votes[name])}), flush=True)
    single = bootstrap(list(alone.values()))[:, :, 1, 0]
    for i, name in enumerate(alone):
        if i:
            over = said(difference(single[i] - single[0]))
            print(json.dumps({"over": "plain", "arm": name, "a path": over}), flush=True)
    tokens = [n * float(alone["plain"].tokens.mean()) for n in MATCHED]
    against(votes, "plain", tokens)
    searches = {name: method(field, "hyper", MATCHED, **how) for name, how in SEARCHES.items()}
    for name, found in searches.items():
        print(json.dumps({"arm": name, **figures(found)}), flush=True)
    against(searches, "hyper", tokens[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--problems", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--split", choices=("dev", "test"), default="dev")
    parser.add_argument("--arms", nargs="*", choices=tuple(ARMS), default=tuple(ARMS))
    args = parser.parse_args()
    from jaxserve import LLM

    with LLM(MODEL, progress=False, enable_route_noise=True) as llm:
        llm.wait_until_warm()
        seeds = range(args.seeds)
        measure(Field.of(llm, task_of(MODEL), args.split, args.problems, seeds), args.arms)
    print(json.dumps({"name": "refinement", **vars(args), **machine()}))


if __name__ == "__main__":
    main()
