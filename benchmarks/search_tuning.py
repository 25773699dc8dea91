"""Hyper-parameters of searches, chosen on a dev split with as many trials for each method.

    python -m benchmarks.path_bank models/modchain-moe --problems 400 --paths 128
    python -m benchmarks.search_tuning runs/paths/modchain-moe-dev.npz --problems 300

runs every setting of `TRIALS` on recorded paths (see `benchmarks.replay`) and keeps, for each
method, the one with the largest area under its curve of accuracy over log tokens, from 4 to 64
paths. What is kept goes to `search_settings.json`, which `benchmarks.search` reads.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import search_stats
from benchmarks.path_bank import Bank
from benchmarks.pool_search import BUDGETS, LENGTH, Asked, recorded, run
from benchmarks.records import machine
from benchmarks.search_methods import SETTINGS, sized
from benchmarks.search_stats import Runs
from reasoning.controllers import CONTROLLERS

SEARCH = {"novelty": 0.01, "safe": 2}
TRIALS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "hyper": [
        {"novelty": 0.05, "safe": 0},
        {"novelty": 0.01, "safe": 0},
        SEARCH,
        SEARCH | {"safe": 3},
        SEARCH | {"novelty": 0.002},
        SEARCH | {"floor": 3.25},
        SEARCH | {"deep": 1.0},
        SEARCH | {"alike": 3},
    ],
    "deepconf": [
        {"keep": 0.9, "window": 16, "period": 16},  # as published, for these lengths
        {"keep": 0.9, "window": 1, "period": 4},
        {"keep": 0.5, "window": 1, "period": 4},
        {"keep": 0.3, "window": 1, "period": 4},
        {"keep": 0.1, "window": 1, "period": 4},
        {"keep": 0.3, "window": 4, "period": 4},
        {"floor": 3.25, "window": 1, "period": 4},
        {"floor": 3.5, "window": 1, "period": 4},
    ],
    "adaptive-consistency": [
        {"sure": sure} for sure in (0.8, 0.85, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995)
    ],
    "esc": [{"window": window} for window in (2, 3, 4, 5, 6, 8, 10, 12)],
    "slim-sc": [
        {"similar": similar, "window": window, "delay": 10, "period": 5}
        for similar in (0.8, 0.9, 0.95, 0.99)
        for window in (16, 32)
    ],
}


def tune(asked: Sequence[Sequence[Asked]], names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A line for each trial: its curve, and the area under it."""
    for name in names:
        for settings in TRIALS[name]:
            found = trial(name, settings, asked)
            tokens, right = search_stats.curve(found)
            yield {
                "method": name,
                "settings": settings,
                "area": round(area(found), 4),
                "tokens": [round(float(t), 1) for t in tokens],
                "accuracy": [round(float(r), 4) for r in right],
            }


def trial(name: str, settings: Mapping[str, Any], asked: Sequence[Sequence[Asked]]) -> Runs:
    """A method at every budget of plain paths, for each seed."""
    right, tokens = list[list[np.ndarray]](), list[list[np.ndarray]]()
    for paths in BUDGETS:
        policy = CONTROLLERS[name](**{**sized(name, paths), **settings})
        cells = [run(policy, questions, paths * LENGTH) for questions in asked]
        right.append([cell[0] for cell in cells])
        tokens.append([cell[1] for cell in cells])
    return Runs(np.array(right).swapaxes(1, 2), np.array(tokens).swapaxes(1, 2))


def area(found: Runs) -> float:
    """Mean accuracy over log tokens, from the least budget to the largest."""
    tokens, right = search_stats.curve(found)
    curves = np.stack([tokens, right])[None]
    return float(
        search_stats.area(curves, max(BUDGETS[0] * LENGTH, tokens[0]), BUDGETS[-1] * LENGTH)[0]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bank", type=Path)
    parser.add_argument("--problems", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--methods", nargs="+", choices=TRIALS, default=list(TRIALS))
    args = parser.parse_args()
    bank = Bank.load(args.bank)
    asked = [list(recorded(bank, seed, args.problems)) for seed in range(args.seeds)]
    best = dict[str, dict[str, Any]]()
    about = {"bank": args.bank.stem, "problems": args.problems, "seeds": args.seeds}
    for line in tune(asked, args.methods):
        print(json.dumps({"name": "search-tuning", **about, **line, **machine()}), flush=True)
        if line["area"] > best.get(line["method"], {"area": -1.0})["area"]:
            best[line["method"]] = line
    known = json.loads(SETTINGS.read_text()) if SETTINGS.exists() else {}
    known |= {name: line["settings"] for name, line in best.items()}
    SETTINGS.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
