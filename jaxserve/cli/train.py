"""train: train or fine-tune a model as a TOML file says, and write a Hugging Face folder"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxserve.models.family import Family
    from jaxserve.text.tokenizer import Tokenizer
    from jaxserve.train.config import TrainConfig
    from jaxserve.train.loop import Run
    from reasoning.tasks import Task


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options of this command."""
    parser.add_argument("config", type=Path, help="what to train; models/recipes has examples")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> None:
    """Trains to the last step, from the newest checkpoint on, and prints where the model is."""
    from jaxserve.errors import ConfigError

    try:
        from jaxserve.train.loop import train
    except ModuleNotFoundError as error:
        raise ConfigError(f"training needs {error.name}: pip install 'jaxserve[train]'") from None
    from jaxserve.train.config import read_config

    job = prepare(read_config(args.config))
    print(train(job, progress=not args.quiet and sys.stderr.isatty()))


def prepare(config: TrainConfig) -> Run:
    """The model and the data that a config names.

    Raises:
        ConfigError, CheckpointError: one of them is not what the config says.
    """
    from jaxserve.checkpoint import hf, hub
    from jaxserve.errors import ConfigError
    from jaxserve.text.tokenizer import Tokenizer
    from jaxserve.train.loop import Run
    from jaxserve.train.sources import Lines, Pairs
    from sharding.tree import initialise

    task = _task(config)
    if config.model.path:
        folder = hub.resolve(config.model.path)
        raw = hf.read_config(folder)
    else:
        if task is None:
            raise ConfigError("[model] config needs a [data] task, whose words are the vocabulary")
        folder = _new_folder(Path(config.save.folder), task.words)
        raw = _completed(config.model.config, Tokenizer.from_folder(folder))
    raw, module = _trained(raw, config.ahead)
    cfg = hf.model_config(module, raw)
    tokenizer = Tokenizer.from_folder(folder)
    tokenizer.check_vocab(cfg.vocab)
    if config.model.path:
        params = hf.load_params(folder, module, cfg, config.model.dtype, progress=False)
    else:
        declared = module.declare_params(cfg)
        params = initialise(declared, cfg.sizes, config.model.dtype, config.seed)
    end = min(tokenizer.eos_token_ids, default=None)
    if end is None:
        raise ConfigError(f"{folder} has no eos_token, so a model could not learn to stop")
    if task is not None:
        source = Pairs(_pairs(task, config.data.seed), tokenizer.encode, end)
    else:
        source = Lines(tuple(map(Path, config.data.files)), config.data.seed, tokenizer.encode, end)
    return Run(config, module, cfg, raw, params, source, folder)


def _trained(raw: dict[str, Any], ahead: float) -> tuple[dict[str, Any], Family]:
    """The family, with its layers for multi-token prediction if they are trained too."""
    from jaxserve.errors import ConfigError
    from jaxserve.models import deepseek_v3_mtp
    from jaxserve.models.family import family

    module = family(raw.get("model_type"))
    num_ahead = raw.get("num_nextn_predict_layers") or 0
    if not num_ahead or not ahead:
        return {**raw, "num_nextn_predict_layers": 0} if num_ahead else raw, module
    if num_ahead > 1 or raw["model_type"] != "deepseek_v3":
        raise ConfigError(
            f"{raw['model_type']} with num_nextn_predict_layers={num_ahead} cannot be trained: one "
            "layer of deepseek_v3 can; ahead = 0 leaves such layers out"
        )
    return raw, deepseek_v3_mtp  # type: ignore[return-value]


def _task(config: TrainConfig) -> Task | None:
    from jaxserve.errors import ConfigError
    from reasoning.tasks import TASKS

    if not config.data.task:
        return None
    if config.data.task not in TASKS:
        known = ", ".join(TASKS)
        raise ConfigError(f"[data] task {config.data.task!r} is not known; there are {known}")
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in config.data.settings.items()}
    try:
        return TASKS[config.data.task](**settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"[data] settings of {config.data.task!r}: {error}") from None


def _pairs(task: Task, seed: int) -> Callable[[int], tuple[str, str]]:
    """Problem and solution by number: each is drawn from the seed and its number alone."""
    from reasoning.tasks import draw

    def pair(index: int) -> tuple[str, str]:
        problem = draw(task, "train", seed, index)
        return problem.prompt, task.solve(problem, Random(f"{seed} {index}"))

    return pair


def _new_folder(folder: Path, words: Sequence[str]) -> Path:
    """A tokenizer of a task's words, beside the checkpoints."""
    from jaxserve.text.words import write_word_tokenizer

    path = folder / "tokenizer"
    path.mkdir(parents=True, exist_ok=True)
    write_word_tokenizer(path, words)
    return path


def _completed(config: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json with what the tokenizer knows."""
    known = {
        "vocab_size": tokenizer.vocab_size,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": min(tokenizer.eos_token_ids),
    }
    return {**known, **config}
