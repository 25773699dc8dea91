"""Training speed: `python -m benchmarks.train`, tokens a second and model FLOP utilisation.

One model shape (that of models/recipes/modchain-moe.toml) at three widths, on packed documents of
its own task. Utilisation is the arithmetic that the model asks for, forward and backward, of the
experts that a token visits and the keys that it sees, divided by what this machine does in float32
matrix products of 1024 x 1024 x 1024, measured between the runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.records import ROOT, record, write
from jaxserve.cli.huge_pages import restart_with_huge_pages
from jaxserve.cli.prepare import prepare
from jaxserve.train.config import ModelConfig, SaveConfig, TrainConfig, read_config
from jaxserve.train.data import Batch, pack
from jaxserve.train.loop import Run, run_loss
from jaxserve.train.step import compiled, optimizer, start
from sharding.tree import is_weight

WIDTHS = (96, 256, 512)
_SIZE = 1024  # of the product that sets the ceiling


def at_width(config: TrainConfig, width: int, folder: Path) -> TrainConfig:
    """The recipe with `width` lanes, in the same proportions."""
    hf = {
        **config.model.config,
        "hidden_size": width,
        "moe_intermediate_size": width,
        "intermediate_size": 2 * width,
        "head_dim": width // 4,
    }
    return dataclasses.replace(config, model=ModelConfig(config=hf), save=SaveConfig(str(folder)))


def flops(run: Run, batch: Batch) -> float:
    """Floating-point operations that an update needs: three times those of the forward pass."""
    cfg, real = run.cfg, np.asarray(batch.segments) > 0
    seen = (np.asarray(batch.positions) + 1)[real].sum()
    attention = 4.0 * cfg.num_layers * cfg.heads * cfg.head_dim * seen
    return 3 * (2.0 * visited(run) * real.sum() + attention)


def visited(run: Run) -> float:
    """Weights that a token is multiplied with; a tied table counts once, as the head."""
    cfg, total = run.cfg, 0.0
    for w in jax.tree.leaves(run.family.declare_params(cfg), is_leaf=is_weight):
        if w.is_matrix and not (w.name.startswith("model.embed") and not cfg.tied):
            share = cfg.router.top_k / cfg.router.num_experts if "{expert}" in w.name else 1.0
            total += share * np.prod(w.shape(cfg.sizes))
    return total


def ceiling(rounds: int = 10) -> float:
    """Floating-point operations a second of a large float32 product."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((_SIZE, _SIZE)), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    times = [_timed(lambda: product(x, x)) for _ in range(rounds)]
    return 2 * _SIZE**3 / statistics.median(times)


def seconds_per_step(run: Run, batch: Batch, steps: int) -> list[float]:
    """Times of single updates, after one that compiles."""
    declared = run.family.declare_params(run.cfg)
    trainable, frozen = run.adapter.start(run.params, declared, 0)
    tx = optimizer(run.config.optimizer, run.config.steps, run.adapter.decayed(declared, trainable))
    update = compiled(tx, partial(run_loss, run))
    state, _ = update(start(tx, trainable), frozen, batch)

    def step() -> Any:
        nonlocal state
        state, metrics = update(state, frozen, batch)
        return metrics.loss

    return [_timed(step) for _ in range(steps)]


def _timed(action: Any) -> float:
    began = time.perf_counter()
    jax.block_until_ready(action())
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    recipe = ROOT / "models" / "recipes" / "modchain-moe.toml"
    parser.add_argument("recipe", type=Path, nargs="?", default=recipe)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, help="append the records to this file")
    args = parser.parse_args()
    restart_with_huge_pages()
    for width in args.widths:
        with tempfile.TemporaryDirectory() as folder:
            run = prepare(at_width(read_config(args.recipe), width, Path(folder)))
            batch, _ = pack(run.source, 0, run.config.rows, run.config.length)
            before = ceiling()
            times = seconds_per_step(run, batch, args.steps)
            peak = statistics.median([before, ceiling()])
        work, rates = flops(run, batch), [batch.num_tokens / t for t in times]
        line = record(
            f"{args.recipe.stem}-{width}", "train", rates, "tok/s",
            versions={"jax": jax.__version__},
            parameters=sum(x.size for x in jax.tree.leaves(run.params)),
            gflops_per_s=round(work / statistics.median(times) / 1e9, 2),
            ceiling_gflops_per_s=round(peak / 1e9, 2),
            utilisation=round(work / statistics.median(times) / peak, 4),
        )  # fmt: skip
        write(line)
        if args.out:
            write(line, args.out)


if __name__ == "__main__":
    main()
