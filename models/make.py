"""Makes a shipped model again, from its recipe: `python -m models.make modchain-moe`.

Trains, exports, fits the reward heads of a reasoner, and writes the card with what was measured.
A run that was interrupted goes on from its last checkpoint under `runs/`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.reason_eval import generator, judge, run, table
from benchmarks.records import machine
from jaxserve import LLM
from jaxserve.checkpoint.reward_head import save_reward_head
from jaxserve.cli.huge_pages import restart_with_huge_pages
from jaxserve.cli.prepare import prepare
from jaxserve.train.config import read_config
from jaxserve.train.loop import Run, train
from jaxserve.train.reward import fit_reward_head
from reasoning.step_labels import label_steps
from reasoning.tasks import Task, distinct, make_task, problems

MODELS = Path(__file__).parent
REASONERS = ("modchain", "countdown")
HEADS = {"reward_head": 3000, "reward_head_weak": 20}
"""Reward heads by file, and the steps they are trained for: a good one, and one to sweep with."""


def make(recipe: Path, out: Path, *, quick: bool = False) -> Path:
    """The folder of a finished model.

    Args:
        quick: few problems and samples, to see that it works.
    """
    began = time.monotonic()
    job = prepare(read_config(recipe))
    source, folder = train(job, progress=sys.stderr.isatty()), out / recipe.stem
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    shutil.copy2(recipe, folder / "recipe.toml")
    task = make_task(job.config.data.task, job.config.data.settings)
    if job.config.data.task in REASONERS:
        with LLM(folder, progress=False) as llm:
            _reward_heads(llm, folder, task, 40 if quick else 2400)
    _examples(folder, task)
    figures = run(folder, "test", *((20, 16) if quick else (500, 64)))
    card = _card(job, recipe.stem, figures, time.monotonic() - began)
    (folder / "README.md").write_text(card)
    return folder


def _reward_heads(llm: LLM, folder: Path, task: Task, count: int) -> None:
    """Labels the model's own solutions of training problems, and fits a head of each quality."""
    some = list(islice(problems(task, "train", 1), count))
    solutions = label_steps(task, some, generator(llm, seed=0), samples=8, tries=8)
    data = judge(llm, folder, solutions)
    for name, steps in HEADS.items():
        save_reward_head(folder / f"{name}.safetensors", fit_reward_head(data, steps=steps))


def _examples(folder: Path, task: Task) -> None:
    """Sixteen held-out problems with their answers."""
    found = [
        {"prompt": problem.prompt, "answer": task.answer(problem)}
        for problem in distinct(task, "test", 0, 16)
    ]
    (folder / "examples.json").write_text(json.dumps(found, indent=1) + "\n")


def _card(job: Run, name: str, figures: dict[str, Any], seconds: float) -> str:
    """The model card, in Markdown."""
    config = job.config
    task = make_task(config.data.task, config.data.settings)
    lines = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
    trained, tokens = (sum(line[key] for line in lines) for key in ("seconds", "tokens"))
    size = sum(x.size for x in jax.tree.leaves(job.params))
    problem = distinct(task, "test", 0, 1)[0]
    about = {
        "architecture": f"`{job.hf['model_type']}`, {size / 1e6:.2f} M parameters, float32",
        "task": f"`{task}`",
        "data": f"{tokens / 1e6:.1f} M tokens; the first 1,000 documents hash to "
        f"`{_data_hash(job)}` (SHA-256); problems of the dev and test splits are not among them",
        "seeds": f"weights {config.seed}, data {config.data.seed}",
        "last loss": f"{np.mean([line['loss'] for line in lines[-50:]]):.4f} nats "
        "(mean of 50 steps)",
        "training time": f"{trained / 60:.1f} min for {config.steps} steps on "
        f"{machine()['device']}",
        "made": f"by `python -m models.make {name}`; labels, heads and evaluation took "
        f"{(seconds - min(trained, seconds)) / 60:.1f} min more"
        if seconds > trained
        else f"by `python -m models.make {name}`",
    }
    if (MODELS / "recipes" / f"{name}-large.toml").exists():
        about["larger"] = (
            f"`python -m models.make {name}-large` trains its larger sibling where there is an "
            "accelerator; it has not been trained yet"
        )
    rows = "\n".join(f"| {key} | {value} |" for key, value in about.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
license: apache-2.0
---

# {name}

{(sys.modules[type(task).__module__].__doc__ or "").splitlines()[0]} The task is described in
[reasoning/tasks/{config.data.task}.py](../../reasoning/tasks/{config.data.task}.py), the model in
[recipe.toml](recipe.toml).

| | |
|---|---|
{rows}

A prompt and its answer: `{problem.prompt}` `{task.answer(problem)}`. `examples.json` has more.

## Measured on held-out problems

Samples at temperature 1; 95 % bootstrap intervals over problems. pass@k is the unbiased estimate,
majority@k the vote of the first k samples, `confidence_auroc` how well a sample's mean
log-probability tells right from wrong, and `reward_head*` how well the heads tell right steps, and
right solutions, from wrong ones. `python -m benchmarks.reason_eval models/{name}` measures again.

{table({name: figures})}
"""


def _data_hash(job: Run) -> str:
    digest = hashlib.sha256()
    for i in range(1000):
        digest.update(json.dumps(list(job.source.document(i).tokens)).encode())
    return digest.hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = sorted(path.stem for path in (MODELS / "recipes").glob("*.toml"))
    parser.add_argument("names", nargs="+", choices=known)
    parser.add_argument("--out", type=Path, default=MODELS)
    parser.add_argument("--quick", action="store_true", help="a rough evaluation")
    args = parser.parse_args()
    restart_with_huge_pages()
    for name in args.names:
        print(make(MODELS / "recipes" / f"{name}.toml", args.out, quick=args.quick))


if __name__ == "__main__":
    main()
