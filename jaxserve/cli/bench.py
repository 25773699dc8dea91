"""bench: how fast this machine runs a model, without a server"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

from jaxserve.cli.options import add_engine_options, add_process_options, load
from jaxserve.errors import ConfigError
from jaxserve.request import SamplingParams


@dataclass(frozen=True)
class Workload:
    """So many prompts of so many random tokens, each continued by `output_len` tokens."""

    name: str
    num_prompts: int
    prompt_len: int
    output_len: int


@dataclass(frozen=True)
class Figures:
    """Medians over the rounds; a decoding rate leaves the time to the first tokens out."""

    workload: str
    num_prompts: int
    prompt_len: int
    output_len: int
    seconds: float
    ttft_seconds: float
    decode_tokens_per_second: float | None
    prefill_tokens_per_second: float


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options of this command."""
    parser.add_argument("model", help="a folder with a Hugging Face checkpoint, or a hub id")
    parser.add_argument("--rounds", type=int, default=3, help="measured after one that warms up")
    parser.add_argument("--prompt-len", type=int, default=32, help="tokens before decoding")
    parser.add_argument("--output-len", type=int, default=128, help="tokens decoded")
    parser.add_argument("--batch", type=int, default=16, help="sequences decoded together")
    parser.add_argument("--prefill-len", type=int, default=1024, help="tokens of the long prompt")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_engine_options(parser)
    add_process_options(parser)


def run(args: argparse.Namespace) -> None:
    """Measures a single stream, a batch and a long prompt, in this order."""
    if min(args.rounds, args.prompt_len, args.output_len, args.batch, args.prefill_len) < 1:
        raise ConfigError("--rounds, lengths and --batch must be at least 1")
    _check_lengths(args, _context(args))
    with load(args) as llm:
        _check_lengths(args, llm.max_model_len)  # memory may have left less
        llm.wait_until_warm()
        prefill_len = min(args.prefill_len, llm.max_model_len - 1)
        workloads = [
            Workload("single stream", 1, args.prompt_len, args.output_len),
            Workload(f"batch of {args.batch}", args.batch, args.prompt_len, args.output_len),
            Workload("prefill", 1, prefill_len, 1),
        ]
        found = [measure(llm, workload, args.rounds) for workload in workloads]
        about = {"model": llm.model_name, "plan": llm.plan.describe()}
    if args.json:
        print(json.dumps({**about, "figures": [asdict(f) for f in found]}))
    else:
        _print(about, found)


def _context(args: argparse.Namespace) -> int:
    """Tokens that a sequence may have, by what can be known without loading anything."""
    from jaxserve.cli.doctor import Checkpoint

    known = Checkpoint.read(args.model, args.revision).model.max_len
    return min(known, args.max_model_len or known)


def _check_lengths(args: argparse.Namespace, context: int) -> None:
    if args.prompt_len + args.output_len > context:
        raise ConfigError(
            f"--prompt-len {args.prompt_len} and --output-len {args.output_len} are "
            f"{args.prompt_len + args.output_len} tokens, and a sequence may have {context}; ask "
            "for fewer"
        )


def measure(llm: Any, workload: Workload, rounds: int) -> Figures:
    """Medians of `rounds` runs after one that warms up. No two runs share a prompt."""
    times = [_time(llm, workload, seed) for seed in range(rounds + 1)][1:]
    seconds = statistics.median(total for total, _ in times)
    first = statistics.median(first for _, first in times)
    decoding = statistics.median(total - first for total, first in times)
    decoded = workload.num_prompts * (workload.output_len - 1)
    return Figures(
        workload.name,
        workload.num_prompts,
        workload.prompt_len,
        workload.output_len,
        seconds,
        first,
        decoded / decoding if decoded else None,
        workload.num_prompts * workload.prompt_len / first,
    )


def _time(llm: Any, workload: Workload, seed: int) -> tuple[float, float]:
    """Seconds until the last token, and until every sequence had its first."""
    rng = random.Random(f"{workload} {seed}")
    vocab = llm.tokenizer.vocab_size
    params = SamplingParams(temperature=0, max_tokens=workload.output_len, ignore_eos=True)
    prompts = [
        [rng.randrange(vocab) for _ in range(workload.prompt_len)]
        for _ in range(workload.num_prompts)
    ]
    started = time.monotonic()
    generations = [llm.submit(prompt, params) for prompt in prompts]
    for generation in generations:
        generation.result()
    total = time.monotonic() - started
    first = max(g.metrics.first_token_time for g in generations) - started
    return total, first


def _print(about: dict[str, str], found: list[Figures]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=about["model"], caption=about["plan"], title_justify="left")
    table.add_column("workload")
    for name in ("in", "out", "first token", "decode tok/s", "prefill tok/s"):
        table.add_column(name, justify="right")
    for f in found:
        decode = f.decode_tokens_per_second
        table.add_row(
            f.workload,
            f"{f.num_prompts} × {f.prompt_len}",
            f"{f.num_prompts} × {f.output_len}",
            f"{f.ttft_seconds * 1000:.0f} ms",
            "" if decode is None else f"{decode:,.0f}",
            f"{f.prefill_tokens_per_second:,.0f}",
        )
    Console().print(table)
