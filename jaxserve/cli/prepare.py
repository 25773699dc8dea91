"""From what a training config says to what is trained: the model, its tokenizer and its data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from jaxserve.checkpoint import hf, hub
from jaxserve.errors import ConfigError
from jaxserve.models import deepseek_v3_mtp
from jaxserve.models.family import Family, family
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.text.virtual_tokens import add_virtual_tokens
from jaxserve.text.words import write_word_tokenizer
from jaxserve.train.adapter import Adapter, Full, Lora, SoftPrompt, with_virtual_tokens
from jaxserve.train.config import DataConfig, TrainConfig
from jaxserve.train.data import Source
from jaxserve.train.loop import Run
from jaxserve.train.sources import Lines, Pairs
from reasoning.tasks import Task, draw, make_task
from sharding.tree import initialise


class _Model(NamedTuple):
    hf: dict[str, Any]  # config.json
    family: Family
    cfg: Any
    params: Any
    folder: Path  # with the tokenizer


def prepare(config: TrainConfig) -> Run:
    """The model and the data that a config names.

    Raises:
        ConfigError, CheckpointError: one of them is not what the config says.
    """
    task = _task(config.data)
    if config.model.path:
        model = _checkpoint(config)
    elif task is not None:
        model = _fresh(config, task)
    else:
        raise ConfigError("[model] config needs a [data] task, whose words are the vocabulary")
    model, adapter = _adapted(config, model)
    tokenizer = Tokenizer.from_folder(model.folder)
    tokenizer.check_vocab(model.cfg.vocab)
    source = _source(config.data, task, tokenizer, model.folder)
    return Run(
        config, model.family, model.cfg, model.hf, model.params, source, adapter, model.folder
    )


def _checkpoint(config: TrainConfig) -> _Model:
    folder = hub.resolve(config.model.path)
    raw, module = _trained(hf.read_config(folder), config)
    cfg = hf.model_config(module, raw)
    params = hf.load_params(folder, module, cfg, config.model.dtype, progress=False)
    return _Model(raw, module, cfg, params, folder)


def _fresh(config: TrainConfig, task: Task) -> _Model:
    """New weights, with a vocabulary of the task's words."""
    folder = Path(config.save.folder) / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    write_word_tokenizer(folder, task.words)
    tokenizer = Tokenizer.from_folder(folder)
    known = {
        "vocab_size": tokenizer.vocab_size,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": min(tokenizer.eos_token_ids),
    }
    raw, module = _trained({**known, **config.model.hf}, config)
    cfg = hf.model_config(module, raw)
    declared = module.declare_params(cfg)
    params = initialise(declared, cfg.sizes, config.model.dtype, config.seed)
    return _Model(raw, module, cfg, params, folder)


def _trained(raw: dict[str, Any], config: TrainConfig) -> tuple[dict[str, Any], Family]:
    """The family, with its layer for multi-token prediction if that is trained too."""
    module, num_ahead = family(raw.get("model_type")), raw.get("num_nextn_predict_layers") or 0
    if not num_ahead or not config.ahead or config.adapter.kind == "soft_prompt":
        return {**raw, "num_nextn_predict_layers": 0} if num_ahead else raw, module
    if num_ahead > 1 or raw["model_type"] != "deepseek_v3":
        raise ConfigError(
            f"{raw['model_type']} with num_nextn_predict_layers={num_ahead} cannot be trained: one "
            "layer of deepseek_v3 can; ahead = 0 leaves such layers out"
        )
    return raw, deepseek_v3_mtp  # type: ignore[return-value]


def _adapted(config: TrainConfig, model: _Model) -> tuple[_Model, Adapter]:
    """The model, grown if that is what the adapter trains."""
    how = config.adapter
    if how.kind == "full":
        return model, Full()
    if how.kind == "lora":
        return model, Lora(how.rank, how.alpha, how.targets)
    folder = Path(config.save.folder) / "virtual_tokens"
    first = add_virtual_tokens(model.folder, folder, how.num_virtual_tokens)
    params = with_virtual_tokens(model.params, first, how.num_virtual_tokens, config.seed)
    raw = {**model.hf, "vocab_size": len(params.embed), "tie_word_embeddings": False}
    cfg = hf.model_config(model.family, raw)
    grown = _Model(raw, model.family, cfg, params, folder)
    return grown, SoftPrompt(first, how.num_virtual_tokens)


def _task(data: DataConfig) -> Task | None:
    try:
        return make_task(data.task, data.settings) if data.task else None
    except ValueError as error:
        raise ConfigError(f"[data] {error}") from None


def _source(data: DataConfig, task: Task | None, tokenizer: Tokenizer, folder: Path) -> Source:
    end = min(tokenizer.eos_token_ids, default=None)
    if end is None:
        raise ConfigError(f"{folder} has no eos_token, so a model could not learn to stop")
    if task is None:
        return Lines(tuple(map(Path, data.files)), data.seed, tokenizer.encode, end)
    return Pairs(_pairs(task, data.seed), tokenizer.encode, end)


def _pairs(task: Task, seed: int) -> Callable[[int], tuple[str, str]]:
    """Problem and solution by number: each is drawn from the seed and its number alone."""

    def pair(index: int) -> tuple[str, str]:
        problem = draw(task, "train", seed, index)
        return problem.prompt, task.solve(problem, Random(f"{seed} {index}"))

    return pair
