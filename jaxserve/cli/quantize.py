"""quantize: write a checkpoint in eight bits (W8A8), calibrated on text"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import reprlib
import sys
import typing
from pathlib import Path
from typing import Any

from jaxserve.cli.options import describe, typed
from jaxserve.errors import ConfigError

log = logging.getLogger(__name__)

NUM_DOCUMENTS, LENGTH = 128, 256
"""How much a model writes where it is given nothing to read."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options of this command; the measures are the fields of `QuantizeConfig`."""
    from jaxserve.quant.config import QuantizeConfig

    parser.add_argument("model", help="a folder with a Hugging Face checkpoint, or a hub id")
    parser.add_argument("out", type=Path, help="where to write; not there yet, or empty")
    parser.add_argument("--revision", help="branch, tag or commit of a hub model")
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE.jsonl",
        help='lines of {"prompt", "completion"} or {"text"}, of the kind the model will meet; '
        "without it the model writes the text itself, behind the prompts of its examples.json "
        "if it has some",
    )  # fmt: skip
    parser.add_argument(
        "--plain", action="store_true",
        help="round to the nearest: only the measures that are asked for, and per channel and "
        "mixed precision",
    )  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    group = parser.add_argument_group("measures")
    kinds, texts = typing.get_type_hints(QuantizeConfig), describe(QuantizeConfig)
    for field in dataclasses.fields(QuantizeConfig):
        options: dict[str, Any] = typed(kinds[field.name])
        text = f"{texts[field.name]} (default: {field.default})"
        options |= {"default": argparse.SUPPRESS, "help": text}  # --plain has other defaults
        group.add_argument(f"--{field.name.replace('_', '-')}", **options)


def run(args: argparse.Namespace) -> None:
    """Reads or writes the text, rounds, and prints where the result is."""
    from jaxserve.plan import default_device
    from jaxserve.quant import PLAIN, QuantizeConfig, check_paths, quantize_checkpoint

    names = [f.name for f in dataclasses.fields(QuantizeConfig)]
    asked = {name: getattr(args, name) for name in names if hasattr(args, name)}
    config = dataclasses.replace(PLAIN if args.plain else QuantizeConfig(), **asked)
    if args.calibration is not None and not config.needs_documents:
        raise ConfigError(
            f"--calibration {args.calibration}: no measure that is left reads text; leave it out, "
            "or ask for one, such as --compensation"
        )
    folder = check_paths(args.model, args.out, args.revision)
    default_device()  # raises where there is none
    progress = not args.quiet and sys.stderr.isatty()
    documents = None
    if config.needs_documents:
        own = None if args.calibration is None else read(folder, args.calibration)
        documents = own or own_text(folder, progress=progress)
    done = quantize_checkpoint(
        args.model, args.out, config, documents=documents, revision=args.revision, progress=progress
    )
    print(done)


def read(folder: Path, file: Path) -> list[list[int]]:
    """The documents of a file of JSON lines.

    Raises:
        ConfigError: it cannot be read, or says nothing.
    """
    from jaxserve.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(folder)
    try:
        lines = file.read_text("utf-8").split("\n")  # others are a string's own
    except (OSError, ValueError) as error:
        raise ConfigError(f"--calibration {file} cannot be read: {error}") from None
    texts = [_text(file, i, line) for i, line in enumerate(lines, 1) if line.strip()]
    if not any(texts):
        raise ConfigError(f"--calibration {file} has no {'text in it' if texts else 'lines'}")
    end = sorted(tokenizer.eos_token_ids)[:1]
    return [ids + end for ids in tokenizer.encode_batch(texts)]


def _text(file: Path, number: int, line: str) -> str:
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    for keys in (("text",), ("prompt", "completion")):
        parts = [entry.get(key) for key in keys] if isinstance(entry, dict) else []
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) == len(keys):
            return " ".join(texts)
    raise ConfigError(
        f'--calibration {file}, line {number}: {reprlib.repr(line)}; expected {{"text": ...}} or '
        '{"prompt": ..., "completion": ...}, of texts'
    )


def own_text(folder: Path, *, seed: int = 0, progress: bool = False) -> list[list[int]]:
    """Documents that the model writes at temperature 1 (Liu et al., 2023, quantise by such text).

    They begin with the prompts of `examples.json` beside the model, or with its first token.
    """
    from jaxserve.llm import LLM
    from jaxserve.request import SamplingParams

    with LLM(folder, progress=progress) as llm:
        prompts = _prompts(folder, llm)
        params = SamplingParams(
            n=-(-NUM_DOCUMENTS // len(prompts)), max_tokens=min(LENGTH, llm.max_model_len // 2),
            seed=seed,
        )  # fmt: skip
        return _written(llm, prompts, params, progress)


def _written(llm: Any, prompts: list[list[int]], params: Any, progress: bool) -> list[list[int]]:
    """`params.n` documents for each prompt, with a bar over their tokens meanwhile."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    documents = [[list(prompt) for _ in range(params.n)] for prompt in prompts]
    most, total = params.max_tokens, params.n * len(prompts)
    log.info("the model writes %d documents of up to %d tokens", total, most)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True, disable=not progress) as bar:
        task = bar.add_task("writing text", total=total * most)
        generations = [llm.submit(prompt, params) for prompt in prompts]
        for prompt, own, generation in zip(prompts, documents, generations, strict=True):
            for delta in generation:
                own[delta.index] += delta.token_ids
                left = most + len(prompt) - len(own[delta.index]) if delta.finished else 0
                bar.advance(task, len(delta.token_ids) + left)
    return [document for own in documents for document in own]


def _prompts(folder: Path, llm: Any) -> list[list[int]]:
    """Beginnings of documents, token ids; half a context at most."""
    if llm.tokenizer is None:
        return [[0]]
    texts = _examples(folder / "examples.json")
    found = [ids[: llm.max_model_len // 2] for ids in map(llm.tokenizer.encode, texts) if ids]
    return found or [[llm.tokenizer.bos_token_id or 0]]


def _examples(path: Path) -> list[str]:
    """The prompts of a model's own examples; none if a file of that name is something else."""
    if not path.is_file():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        found = error
    entries = found if isinstance(found, list) else []
    prompts = [entry.get("prompt") for entry in entries if isinstance(entry, dict)]
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if texts and len(texts) == len(entries):
        return texts
    log.warning(
        '%s holds no examples: %s; expected [{"prompt": "..."}, ...]. The model writes its text '
        "from the first token on", path, reprlib.repr(found),
    )  # fmt: skip
    return []
