"""A checkpoint in eight bits out of one in floats, in the form that compressed-tensors gives it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from jaxserve.checkpoint import hf, hub
from jaxserve.checkpoint.export import begin, save_pretrained
from jaxserve.checkpoint.reward_head import REWARD_HEAD, ROTATED, load_reward_head
from jaxserve.checkpoint.schemes import scheme
from jaxserve.errors import CheckpointError, ConfigError
from jaxserve.models.family import family
from jaxserve.models.reward_head import RewardHead
from jaxserve.quant import rotate, scale_search
from jaxserve.quant.cache import calibrate_cache
from jaxserve.quant.config import MEASURES, QuantizeConfig
from jaxserve.quant.leaves import Leaves
from jaxserve.quant.record import Inputs, record
from jaxserve.quant.rounding import round_matrix, rounded_rows
from jaxserve.quant.weights import is_large
from kernels_pallas.weight import Int8Weight
from sharding.tree import Weight

log = logging.getLogger(__name__)

REFUSED = {"gpt_oss": "its experts are stored in a layout that is only read"}
"""Families whose checkpoints cannot be written, and why."""


def quantize_checkpoint(
    model: str | Path,
    out: str | Path,
    config: QuantizeConfig | None = None,
    *,
    documents: Sequence[Sequence[int]] | None = None,
    revision: str | None = None,
    progress: bool = True,
) -> Path:
    """Writes a model with its large weights in eight bits, and returns the folder.

    The result is a Hugging Face folder (W8A8 of compressed-tensors) with the model's tokenizer,
    chat template, generation defaults and card; `LLM` serves it without being asked. The weights
    are held in float32 meanwhile: four bytes a parameter, and the rows of `config.rows`. Layers for
    multi-token prediction are left behind. Rotations turn hidden states: a reward head beside the
    model is turned with them, another one must be fitted anew, and embeddings compare with those
    of the same checkpoint only.

    Args:
        model: a folder with a Hugging Face checkpoint in floats, or a hub id.
        out: where to write; a folder that is not there yet or empty.
        documents: token ids of texts of the kind that the model will meet, for calibration. A few
            thousand tokens are enough.

    Raises:
        CheckpointError: the model cannot be read, is in eight bits already, or is of a family that
            cannot be written; or `out` cannot.
        ConfigError: `out` is not empty, or measures were asked for that need documents.
    """
    config, out = config or QuantizeConfig(), Path(out).expanduser()
    folder = check_paths(model, out, revision)
    raw = hf.read_config(folder)
    if config.needs_documents and not any(map(len, documents or ())):
        raise ConfigError(
            "calibration needs documents, and there are none; `jaxserve.quant.PLAIN` rounds without"
        )
    module = family(raw.get("model_type"))
    cfg = hf.model_config(module, raw)
    _check_tokens(documents or (), cfg.vocab)
    card = _card(folder, str(model), config)  # what may fail, before hours of rounding
    params = hf.load_params(
        folder, module, cfg, "float32", unrolled=True, place=lambda _, x: x, progress=progress
    )
    leaves = Leaves.of(module, cfg, params, _dtype(raw))
    turn = quantize(leaves, config, documents or (), progress=progress)
    scales = _cache_scales(leaves, documents or (), progress) if config.kv_cache else None
    _to_dtype(leaves)
    config_json = {**_config_json(raw, leaves), **({} if turn is None else {ROTATED: True})}
    save_pretrained(
        out, module, leaves.cfg, leaves.tree(), config_json, beside=folder, card=card,
        kv_scales=scales, reward_head=_turned_head(folder, raw, cfg.embed, turn),
    )  # fmt: skip
    return out


def quantize(
    leaves: Leaves,
    config: QuantizeConfig,
    documents: Sequence[Sequence[int]],
    *,
    progress: bool = False,
) -> np.ndarray | None:
    """Makes eight-bit weights of a model's large ones, in place; an output head stays in floats.

    Returns:
        What `rotate.rotate` does; None if the model was not rotated.
    """
    turn = None
    with _bars(progress) as bar:
        if config.rotations:
            if (why := rotate.refusal(leaves)) is None:
                turn = rotate.rotate(leaves, config.seed)
            else:
                log.info("not rotated: %s", why)
        inputs = None
        if config.reads_inputs:
            total = _num_tokens(leaves, documents)
            log.info("reading %d tokens of %d documents", total, len(documents))
            task = bar.add_task("reading text", total=total)
            inputs = record(
                leaves, documents, rows=config.rows, seed=config.seed,
                advance=lambda n: bar.advance(task, n),
            )  # fmt: skip
        task = bar.add_task("rounding", total=len(leaves.layers))
        for i in range(len(leaves.layers)):
            if config.scale_search and inputs is not None:
                scale_search.search(leaves, inputs, i, config.per_channel)
            _round_layer(leaves, inputs, i, config)
            log.info("layer %d of %d is rounded", i + 1, len(leaves.layers))
            bar.advance(task)
    if not config.mixed_precision:
        leaves.outer["embed"] = rounded_rows(leaves.outer["embed"])
    return turn


def _turned_head(
    folder: Path, raw: dict[str, Any], embed: int, turn: np.ndarray | None
) -> RewardHead | None:
    """The reward head beside a model, for hidden states that are turned."""
    if not (folder / REWARD_HEAD).is_file():
        return None
    head = load_reward_head(folder / REWARD_HEAD, embed, rotated=bool(raw.get(ROTATED)))
    if turn is None:
        return head
    return replace(head, w_in=np.asarray(head.w_in @ turn, np.float32))


def _bars(progress: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, transient=True, disable=not progress)


def _num_tokens(leaves: Leaves, documents: Sequence[Sequence[int]]) -> int:
    """How many tokens are read: each document as far as the model knows positions."""
    return sum(min(len(d), leaves.cfg.max_len) for d in documents)


def _cache_scales(
    leaves: Leaves, documents: Sequence[Sequence[int]], progress: bool
) -> dict[str, np.ndarray]:
    total = _num_tokens(leaves, documents)
    log.info("reading %d tokens for the scales of the cache", total)
    with _bars(progress) as bar:
        task = bar.add_task("calibrating the cache", total=total)
        return calibrate_cache(leaves, documents, advance=lambda n: bar.advance(task, n))


def _round_layer(leaves: Leaves, inputs: Inputs | None, i: int, config: QuantizeConfig) -> None:
    layer = leaves.layers[i]
    for name, spec in leaves.specs()[i].items():
        if is_large(spec):
            w = layer[name]
            layer[name] = _round_leaf(spec, name, w, inputs, i, config)
            bias = name.replace(".w", ".b")
            if inputs is not None and config.compensation and bias in layer:
                layer[bias] = layer[bias] + _mean_error(w, layer[name], inputs.rows(i, name))
        elif spec.is_matrix and not config.mixed_precision:
            layer[name] = rounded_rows(layer[name])


def _round_leaf(
    spec: Weight, name: str, w: np.ndarray, inputs: Inputs | None, i: int, config: QuantizeConfig
) -> Int8Weight:
    measures = {
        "per_channel": config.per_channel,
        "clipping": config.clipping,
        "compensation": config.compensation,
    }
    if "{expert}" in spec.name:
        found = [
            round_matrix(x, None if inputs is None else inputs.rows(i, name, e), **measures)
            for e, x in enumerate(w)
        ]
        return Int8Weight(np.stack([f.values for f in found]), np.stack([f.scale for f in found]))
    out = w.shape[:-1]
    rows = None if inputs is None else inputs.rows(i, name)
    found = round_matrix(w.reshape(int(np.prod(out)), -1), rows, **measures)
    return Int8Weight(found.values.reshape(w.shape), found.scale.reshape(out))


def _mean_error(w: np.ndarray, rounded: Int8Weight, inputs: np.ndarray) -> np.ndarray:
    """E[W x - Q(W) Q(x)], in the shape of a bias."""
    matrix = w.reshape(-1, inputs.shape[1])
    values = rounded.values.reshape(matrix.shape) * rounded.scale.reshape(-1, 1)
    error = matrix @ inputs.mean(0) - values @ rounded_rows(inputs).mean(0)
    return error.reshape(rounded.scale.shape).astype(np.float32)


def _to_dtype(leaves: Leaves) -> None:
    """Casts what stays in floats to the type in which it will be stored, in place."""
    for layer, spec in zip(leaves.layers, leaves.specs(), strict=True):
        for name, x in layer.items():
            if not isinstance(x, Int8Weight):
                layer[name] = x.astype(spec[name].dtype or leaves.dtype)
    for name, x in leaves.outer.items():
        leaves.outer[name] = x.astype(leaves.dtype)


def _dtype(raw: dict[str, Any]) -> np.dtype:
    """The type of what stays in floats: the checkpoint's."""
    own = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    return np.dtype(own if own in ("float32", "float16", "bfloat16") else "float32")


def check_paths(model: str | Path, out: str | Path, revision: str | None = None) -> Path:
    """The model's folder, if it can be read and the result be written; raises otherwise."""
    out = Path(out).expanduser()
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; give a folder that is not there yet")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty; give a folder that is not there yet")
    if out.exists() and out.samefile(Path.cwd()):  # it is replaced, under the feet of a shell
        raise ConfigError(f"{out} is the folder that you are in; give one that is not there yet")
    folder = hub.resolve(model, revision)
    raw = hf.read_config(folder)
    family(raw.get("model_type"))
    stored = scheme(raw)
    if stored is not None and stored.kind == "int8":
        raise CheckpointError(
            f"{folder} is in eight bits already; `jaxserve serve` takes it as it is"
        )
    if why := REFUSED.get(raw.get("model_type", "")):
        raise CheckpointError(f"{raw['model_type']} cannot be quantised: {why}")
    begin(out).rmdir()  # now, not when hours of rounding are done
    return folder


def _check_tokens(documents: Sequence[Sequence[int]], vocab: int) -> None:
    for document in documents:
        if outside := [t for t in document if not 0 <= t < vocab]:
            raise ConfigError(f"documents: token {outside[0]} is beyond the vocabulary of {vocab}")


def _config_json(raw: dict[str, Any], leaves: Leaves) -> dict[str, Any]:
    left = {"num_nextn_predict_layers": 0} if raw.get("num_nextn_predict_layers") else {}
    return {
        **{key: x for key, x in raw.items() if key != "torch_dtype"},
        **left,
        "tie_word_embeddings": leaves.cfg.tied,
        "quantization_config": _quantization_config(leaves),
    }


def _quantization_config(leaves: Leaves) -> dict[str, Any]:
    """What vLLM and transformers read: int8 rows with a scale each, activations as they come."""
    kind: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True, "group_size": None}
    weights = {**kind, "strategy": "channel", "dynamic": False, "observer": "minmax"}
    activations = {**kind, "strategy": "token", "dynamic": True, "observer": None}
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": _ignored(leaves),
        "kv_cache_scheme": None,
    }


def _ignored(leaves: Leaves) -> list[str]:
    """Modules with a matrix that stays in floats, by their full names."""
    names = {
        spec.name.format(layer=spec.layers[0]).removesuffix(".weight")
        for specs in leaves.specs()
        for spec in specs.values()
        if spec.is_matrix and not is_large(spec)
    }
    return ["lm_head", *sorted(names)]


def _card(folder: Path, model: str, config: QuantizeConfig) -> str:
    """The model's own card, and what was done to it."""
    path, own = folder / "README.md", f"# {Path(model).name}\n"
    if path.is_file():
        own = path.read_text(encoding="utf-8", errors="replace").rstrip() + "\n"
    used = ", ".join(name.replace("_", " ") for name in MEASURES if getattr(config, name))
    return f"""{own}
## Eight bits

Large weights are int8 with a scale for each output, for activations that are rounded to int8
with a scale for each token (W8A8, compressed-tensors). Made with `jaxserve quantize`; measures:
{used or "none"}.
Figures above are of the model in floats.
transformers reads this form of dense models alone: it fuses experts, which it then refuses.
"""
