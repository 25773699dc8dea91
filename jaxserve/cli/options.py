"""Options that commands share. The engine's are the fields of `EngineConfig`: none is missing."""

from __future__ import annotations

import argparse
import dataclasses
import re
import types
import typing
from typing import Any

from jaxserve.config import OTHER_NAMES, EngineConfig
from jaxserve.request import SamplingParams

_SHORT = {
    "tensor_parallel_size": ("--tp", "-tp"),
    "data_parallel_size": ("--dp", "-dp"),
    "expert_parallel_size": ("--ep", "-ep"),
}
"""Other spellings, as vLLM and SGLang have them."""

_SWITCHES = {
    "enable_expert_parallel",
    "enable_eplb",
    "load_in_8bit",
    "calculate_kv_scales",
    "enforce_eager",
    "enable_chunked_prefill",
    "trust_remote_code",
}
"""Those of `OTHER_NAMES` behind which no value stands."""


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """`--max-model-len` for `EngineConfig.max_model_len`, and so on."""
    group = parser.add_argument_group("engine")
    group.add_argument("--revision", help="branch, tag or commit of a hub model")
    kinds, texts = typing.get_type_hints(EngineConfig), describe(EngineConfig)
    for field in dataclasses.fields(EngineConfig):
        options: dict[str, Any] = typed(kinds[field.name])
        options |= {"default": field.default, "help": texts[field.name].replace("%", "%%")}
        names = [f"--{field.name.replace('_', '-')}", *_SHORT.get(field.name, ())]
        group.add_argument(*names, **options)
    for name in OTHER_NAMES:  # taken so that `EngineConfig.of` can say what they are called here
        takes: dict[str, Any] = {"action": "store_true"} if name in _SWITCHES else {"nargs": "?"}
        option = f"--{name.replace('_', '-')}"
        group.add_argument(option, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **takes)


def add_process_options(parser: argparse.ArgumentParser) -> None:
    """How the processes of a mesh find each other (jaxserve/cli/processes.py), in JAX's names."""
    mesh = parser.add_argument_group(
        "processes", "the same command in each of them, with a number of its own; 0 does the work"
    )
    mesh.add_argument(
        "--coordinator-address", "--coordinator", metavar="HOST:PORT", help="process 0 listens here"
    )
    mesh.add_argument("--num-processes", type=int, metavar="INT", help="that share the devices")
    mesh.add_argument("--process-id", type=int, metavar="INT", help="of this one, from 0")


def engine_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What was asked of the engine, as keyword arguments of `LLM`."""
    names = [f.name for f in dataclasses.fields(EngineConfig)]
    names += [name for name in OTHER_NAMES if hasattr(args, name)]
    return {name: getattr(args, name) for name in names} | {"revision": args.revision}


def load(args: argparse.Namespace) -> Any:
    """The model that was asked for."""
    from jaxserve.llm import LLM

    return LLM(args.model, **engine_settings(args))


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """The sampling parameters that are of use on a command line; `--seed` is the engine's."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=int, help="most tokens to write; else the context")
    group.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    group.add_argument("--top-p", type=float, default=1.0, help="share of the likeliest mass kept")
    group.add_argument("--top-k", type=int, default=0, help="number of likeliest tokens; 0: all")
    group.add_argument("--min-p", type=float, default=0.0, help="least share of the likeliest")
    group.add_argument("--stop", action="append", default=[], help="text to end at; repeatable")


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """What was asked, as the engine's parameters."""
    return SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        stop=args.stop,
    )


def typed(kind: Any) -> dict[str, Any]:
    """argparse's description of a field's type."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):  # of a Literal it is the latter
        (kind,) = (k for k in kind.__args__ if k is not type(None))
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(kind) is typing.Literal:  # the config refuses others, and says why
        return {"type": str, "metavar": f"{{{','.join(typing.get_args(kind))}}}"}
    return {"type": kind, "metavar": kind.__name__.upper()}


def describe(config: type) -> dict[str, str]:
    """The lines under `Attributes:` of a class's docstring, by attribute."""
    _, _, lines = (config.__doc__ or "").partition("Attributes:\n")
    found = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", lines, re.MULTILINE)
    return {name: re.sub(r"\s+", " ", text).rstrip(".") for name, text in found}
