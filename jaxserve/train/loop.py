"""A training run from its config to a Hugging Face folder, going on where it was interrupted."""

from __future__ import annotations

import dataclasses
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxserve.checkpoint.export import begin, save_pretrained
from jaxserve.models.family import Family
from jaxserve.train.adapter import Adapter, merged
from jaxserve.train.checkpoint import Checkpoints
from jaxserve.train.config import TrainConfig
from jaxserve.train.data import Batch, Packed, Source, ahead, pack
from jaxserve.train.journal import Journal
from jaxserve.train.loss import Metrics, next_token_loss, num_experts, training_ops
from jaxserve.train.step import compiled, optimizer, start


@dataclass(frozen=True)
class Run:
    """A model, its data and what to do with them.

    Attributes:
        hf: the model's config.json.
        params: the weights that a fresh run begins with.
        source: documents.
        adapter: what of the model is trained.
        beside: folder with the tokenizer, which goes along with the trained model.
    """

    config: TrainConfig
    family: Family
    cfg: Any
    hf: dict[str, Any]
    params: Any
    source: Source
    adapter: Adapter
    beside: Path | None = None

    @property
    def folder(self) -> Path:
        return Path(self.config.save.folder)


def train(run: Run, *, progress: bool = True) -> Path:
    """Runs to the last step and exports the model: the folder that holds it.

    Raises:
        CheckpointError: a checkpoint belongs to another run, or something cannot be written.
    """
    folder = run.folder / "model"
    begin(folder).rmdir()  # now, not when days of steps are done
    params = fit(run, progress=progress)
    save_pretrained(folder, run.family, run.cfg, params, run.hf, beside=run.beside)
    return folder


def fit(run: Run, *, progress: bool = True) -> Any:
    """Runs to the last step, from the newest checkpoint if there is one; the trained weights.

    Every step's loss goes to `metrics.jsonl`, a line each.

    Raises:
        CheckpointError: a checkpoint belongs to another run, or cannot be written.
    """
    config, chosen = run.config, run.adapter
    declared = run.family.declare_params(run.cfg)
    trainable, frozen = chosen.start(run.params, declared, config.seed)
    tx = optimizer(config.optimizer, config.steps, chosen.decayed(declared, trainable))
    update = compiled(tx, partial(run_loss, run))
    state = start(tx, jax.tree.map(jnp.copy, trainable))  # updates reuse its buffers
    make = partial(_packed, config, run.source)
    about = {"trained": _shapes(trainable), **_identity(config)}
    with closing(Checkpoints(run.folder / "checkpoints", config.save.keep, about)) as checkpoints:
        found = checkpoints.restore(jax.tree.map(_abstract, state))
        state, cursor = found or (state, 0)
        first = int(state.step)
        with (
            Journal(run.folder, first, config.steps, shown=progress) as journal,
            closing(ahead(make, cursor)) as batches,
        ):
            for step in range(first + 1, config.steps + 1):
                packed = next(batches)
                state, metrics = update(state, frozen, packed.batch)
                journal.add(step, metrics, packed.batch.num_tokens)
                if step % config.save.every == 0 or step == config.steps:
                    journal.write()
                    checkpoints.save(step, state, packed.cursor)
        checkpoints.wait()
    return merged(chosen.model(state.trainable, frozen))


def run_loss(run: Run, trainable: Any, frozen: Any, batch: Batch) -> tuple[Array, Metrics]:
    """What a run minimises; its `adapter` makes (trainable, frozen)."""
    dtype, experts = jnp.dtype(run.config.model.dtype), num_experts(run.cfg)
    ops = training_ops(batch, dtype, num_experts=experts, layers=run.config.layers)
    params = run.adapter.model(trainable, frozen)
    ahead = run.config.ahead if hasattr(run.family, "predict") else 0.0
    return next_token_loss(
        run.family, run.cfg, params, batch, ops, balance=run.config.balance, ahead=ahead
    )


def _packed(config: TrainConfig, source: Source, cursor: int) -> Packed:
    return Packed(*pack(source, cursor, config.rows, config.length))


def _identity(config: TrainConfig) -> dict[str, Any]:
    """What must not change between the parts of an interrupted run."""
    whole = dataclasses.asdict(config)
    return {key: whole[key] for key in ("data", "steps", "rows", "length", "optimizer", "adapter")}


def _abstract(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _shapes(tree: Any) -> list[str]:
    return [f"{x.dtype}{list(x.shape)}" for x in jax.tree.leaves(tree)]
