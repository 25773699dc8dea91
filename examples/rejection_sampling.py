"""Rejection-sampling fine-tuning: sample, keep what is right, train on it, swap the weights, again.

    python examples/rejection_sampling.py

One engine runs throughout. It samples solutions of training problems, the task's checker keeps the
right ones, the trainer learns them, and `llm.load_params` gives the engine the new weights without
a restart. What rises is pass@1 on problems that were never trained on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import tempfile
import tomllib
from itertools import islice
from pathlib import Path
from typing import Any

from jaxserve import LLM, SamplingParams
from jaxserve.cli.prepare import prepare
from jaxserve.train.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    SaveConfig,
    TrainConfig,
)
from jaxserve.train.loop import fit
from reasoning.tasks import Problem, Task, distinct, make_task, problems

MODELS = Path(__file__).parent.parent / "models"


def sampled(llm: LLM, asked: list[Problem], n: int, seed: int) -> list[list[str]]:
    """`n` solutions of each problem at temperature 1."""
    params = SamplingParams(n=n, max_tokens=100, seed=seed)
    outs = llm.generate([problem.prompt for problem in asked], params)
    return [[o.text.strip() for o in out.outputs] for out in outs]


def right_ones(
    task: Task, asked: list[Problem], solutions: list[list[str]]
) -> list[dict[str, str]]:
    """The solutions that the checker accepts, as lines to train on; at most two of a problem."""
    return [
        {"prompt": problem.prompt, "completion": solution}
        for problem, group in zip(asked, solutions, strict=True)
        for solution in [s for s in dict.fromkeys(group) if task.grade(problem, s).correct][:2]
    ]


def pass_at_1(llm: LLM, task: Task, held_out: list[Problem]) -> list[float]:
    """Share of right solutions of each problem; the same seeds every time."""
    groups = sampled(llm, held_out, 8, seed=10_000)
    return [
        statistics.fmean(task.grade(problem, s).correct for s in group)
        for problem, group in zip(held_out, groups, strict=True)
    ]


def fine_tune(
    base: Path, folder: Path, lines: list[dict[str, str]], params: Any, steps: int
) -> Any:
    """The weights after some steps on those lines."""
    folder.mkdir(parents=True)
    (folder / "kept.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = TrainConfig(
        model=ModelConfig(path=str(base)),
        data=DataConfig(files=(str(folder / "kept.jsonl"),)),
        save=SaveConfig(str(folder), every=steps, keep=1),
        steps=steps,
        rows=32,
        length=84,
        optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=steps // 10),
    )
    return fit(dataclasses.replace(prepare(config), params=params), progress=False)


def gain(before: list[float], after: list[float]) -> tuple[float, float, float]:
    """Mean difference over problems, and its 95 % interval."""
    each = [b - a for a, b in zip(before, after, strict=True)]
    mean, error = statistics.fmean(each), statistics.stdev(each) / math.sqrt(len(each))
    return mean, mean - 1.96 * error, mean + 1.96 * error


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "model", type=Path, nargs="?", default=MODELS / "modchain-moe",
        help="a folder with weights and the recipe that names their task",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3, help="of sampling and training")
    parser.add_argument("--problems", type=int, default=2000, help="sampled in each round")
    parser.add_argument("--steps", type=int, default=150, help="updates in each round")
    parser.add_argument("--held-out", type=int, default=400, help="problems that judge, 2 or more")
    args = parser.parse_args()
    if args.held_out < 2:
        parser.error(f"--held-out {args.held_out}: an interval needs at least 2 problems")
    if not (recipe := args.model / "recipe.toml").is_file():
        parser.error(f"{recipe} is not there; give a folder such as models/modchain-moe")
    data = tomllib.loads(recipe.read_text())["data"]
    task = make_task(data["task"], data["settings"])
    held_out = distinct(task, "test", 0, args.held_out)
    stream = problems(task, "train", 2)
    with LLM(args.model, progress=False) as llm, tempfile.TemporaryDirectory() as scratch:
        first = pass_at_1(llm, task, held_out)
        print(f"pass@1 {statistics.fmean(first):.3f}")
        params = None
        for number in range(args.rounds):
            asked = list(islice(stream, args.problems))
            kept = right_ones(task, asked, sampled(llm, asked, 4, seed=number))
            params = fine_tune(
                args.model, Path(scratch) / str(number), kept, params or llm.params, args.steps
            )
            version = llm.load_params(params)
            now = pass_at_1(llm, task, held_out)
            mean, low, high = gain(first, now)
            print(
                f"weights {version}: pass@1 {statistics.fmean(now):.3f}, "
                f"{mean:+.3f} ({low:+.3f} to {high:+.3f}) after {len(kept)} right solutions"
            )


if __name__ == "__main__":
    main()
