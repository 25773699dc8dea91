"""quantize: write a checkpoint in eight bits (W8A8), calibrated on text"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import typing
from pathlib import Path
from typing import Any

from jaxserve.cli.options import describe, typed
from jaxserve.errors import ConfigError

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
        "--plain", action="store_true", help="round to the nearest, and read no text"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    group = parser.add_argument_group("measures")
    kinds, texts = typing.get_type_hints(QuantizeConfig), describe(QuantizeConfig)
    for field in dataclasses.fields(QuantizeConfig):
        options: dict[str, Any] = typed(kinds[field.name])
        options |= {"default": field.default, "help": texts[field.name]}
        group.add_argument(f"--{field.name.replace('_', '-')}", **options)


def run(args: argparse.Namespace) -> None:
    """Reads or writes the text, rounds, and prints where the result is."""
    from jaxserve.quant import PLAIN, QuantizeConfig, check_paths, quantize_checkpoint

    names = [f.name for f in dataclasses.fields(QuantizeConfig)]
    config = PLAIN if args.plain else QuantizeConfig(**{n: getattr(args, n) for n in names})
    folder = check_paths(args.model, args.out, args.revision)
    progress = not args.quiet and sys.stderr.isatty()
    documents = None
    if config.calibrated:
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
        lines = [line for line in file.read_text().splitlines() if line.strip()]
        texts = [_text(json.loads(line)) for line in lines]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f'--calibration {file}: {error}; expected lines of {{"text": ...}} or '
            '{"prompt": ..., "completion": ...}'
        ) from None
    if not texts:
        raise ConfigError(f"--calibration {file} has no lines")
    end = sorted(tokenizer.eos_token_ids)[:1]
    return [ids + end for ids in tokenizer.encode_batch(texts)]


def _text(entry: dict[str, str]) -> str:
    if "text" in entry:
        return entry["text"]
    return f"{entry['prompt']} {entry['completion']}"


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
        outs = llm.generate([{"prompt_token_ids": p} for p in prompts], params)
    return [[*p, *o.token_ids] for p, out in zip(prompts, outs, strict=True) for o in out.outputs]


def _prompts(folder: Path, llm: Any) -> list[list[int]]:
    path = folder / "examples.json"
    if llm.tokenizer is not None and path.exists():
        return [llm.tokenizer.encode(e["prompt"]) for e in json.loads(path.read_text())]
    first = llm.tokenizer.bos_token_id if llm.tokenizer is not None else None
    return [[first or 0]]
