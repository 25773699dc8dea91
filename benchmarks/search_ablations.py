"""What each part of HyPER is worth: `python -m benchmarks.search_ablations --problems 200`.

HyPER with its tuned settings, less one part at a time, on the engine and the dev split: its
actions, the phase that shifts their scores, what it merges and gives up, and its vote. Paired
differences to the whole with 95 % intervals over problems, one JSON line for each.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import search_methods, search_stats
from benchmarks.reason_eval import task_of
from benchmarks.records import machine
from benchmarks.search_methods import Field
from jaxserve.protocol import RouteNoise
from reasoning.answers import LengthConfidence
from reasoning.controllers.hyper_scores import Scores
from reasoning.pool import PoolView

MODEL = Path("models/modchain-moe")
BUDGETS = (4, 8, 16)  # in paths of plain sampling; past them HyPER has ended by itself


@dataclass(frozen=True)
class Timeless(Scores):
    """Scores whose phase stands still."""

    def phase(self, view: PoolView, agreed: float) -> float:
        return 0.5


@dataclass(frozen=True)
class Ready(Scores):
    """Branches whenever there is somewhere to go: no scores, no hysteresis."""

    def choose(self, *args: Any) -> str:
        return "branch"


ARMS: Mapping[str, Mapping[str, Any]] = {
    "whole": {},
    "no branches": {"novelty": 2.0, "width": 16},
    "branches from the start alone": {"alike": 0},
    "always branches": {"scores": Ready()},
    "no phase": {"scores": Timeless()},
    "with segments": {"segment": (6, 2)},
    "with refined tokens": {"route": RouteNoise(spared=0)},
    "unsure paths go on": {"floor": 0.0},
    "slips count": {"slip": float("inf")},
    "never safe": {"safe": 0},
    "no supports": {"support": 0.0},
    "longer counts more": {"vote": LengthConfidence(length_sign=1)},
    "longer counts less": {"vote": LengthConfidence(length_sign=-1)},
}


def ablations(field: Field, arms: Sequence[str] = tuple(ARMS)) -> Iterator[dict[str, Any]]:
    """A line for each arm: its curve, and what it loses to the whole at every budget."""
    chosen = search_methods.settings_of("hyper")
    whole = search_methods.runs(field, "hyper", BUDGETS, chosen)
    for name in arms:
        change = ARMS[name]
        arm = (
            search_methods.runs(field, "hyper", BUDGETS, chosen | dict(change)) if change else whole
        )
        tokens, right = search_stats.curve(arm)
        ours, theirs = search_stats.bootstrap([arm, whole])
        lost = [search_stats.difference(ours[:, 1, b] - theirs[:, 1, b]) for b in range(3)]
        yield {
            "arm": name,
            "tokens": [round(float(t), 1) for t in tokens],
            "accuracy": [round(float(r), 4) for r in right],
            "points": [round(100 * d.value, 2) for d in lost],
            "intervals": [[round(100 * d.low, 2), round(100 * d.high, 2)] for d in lost],
        }


def main() -> None:
    from jaxserve import LLM

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    args = parser.parse_args()
    about = {"model": args.model.name, "problems": args.problems, "budgets": BUDGETS}
    with LLM(args.model, progress=False, enable_route_noise=True) as llm:
        llm.wait_until_warm()
        field = Field.of(llm, task_of(args.model), "dev", args.problems, [args.seed])
        for line in ablations(field, args.arms):
            print(json.dumps({"name": "search-ablation", **about, **line, **machine()}), flush=True)


if __name__ == "__main__":
    main()
