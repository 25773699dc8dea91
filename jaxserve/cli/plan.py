"""plan: how to split a model over a machine, and what that would serve; nothing is compiled"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxserve.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from jaxserve.deployment.search import Plan
    from sharding.topology import Topology

_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options of this command."""
    parser.add_argument("model", help="a published shape such as deepseek-r1, or a model's folder")
    parser.add_argument(
        "--topology", metavar="NAME_OR_TOML",
        help="hardware by name, such as cm384, v5p:4x4x20 or h200:1x2x8, or a TOML file; by "
        "default what --compile names",
    )  # fmt: skip
    parser.add_argument(
        "--compile", metavar="TARGET",
        help="compile the decoding step of this plan for a TPU slice such as v5p:4x4x20, and say "
        "what its compiler reports (needs the extra aot); without --topology, --dp, --ep and --tp "
        "experts lie on all of the slice",
    )  # fmt: skip
    parser.add_argument("--prompt-len", type=int, default=4096, help="tokens of a prompt")
    parser.add_argument("--output-len", type=int, default=256, help="tokens that follow it")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    limits = parser.add_argument_group("limits")
    limits.add_argument("--slo-tpot", type=duration, metavar="TIME", help="of a token, as 50ms")
    limits.add_argument("--slo-ttft", type=duration, metavar="TIME", help="of the first, as 2s")
    fixed = parser.add_argument_group("what the search may not change")
    fixed.add_argument(
        "--batch", type=int,
        help="sequences decoded together on an accelerator: on Ascend an NPU of two dies, as the "
        "paper counts, elsewhere a JAX device",
    )  # fmt: skip
    fixed.add_argument("--dp", type=int, help="replicas of attention")
    fixed.add_argument("--ep", type=int, help="devices that experts are spread over")
    fixed.add_argument("--tp", type=int, help="devices that share the heads of a replica")
    fixed.add_argument("--no-mtp", action="store_true", help="without drafts of the model's own")
    fixed.add_argument(
        "--no-microbatch", action="store_true", help="no two microbatches interleaved"
    )
    fixed.add_argument(
        "--bf16", action="store_true", help="matrices in bfloat16 even if the chip has eight bits"
    )
    fixed.add_argument(
        "--perfect-eplb", action="store_true", help="prompts visit all experts evenly"
    )


def duration(text: str) -> float:
    """Seconds of "50ms", "2s" or "800us"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(us|ms|s)", text)
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no time above 0, such as 50ms or 2s")
    return float(match[1]) * _SECONDS[match[2]]


def run(args: argparse.Namespace) -> None:
    """Finds a plan and prints it."""
    from jaxserve.deployment.report import as_dict

    plan = find(args)
    found = as_dict(plan)
    if args.compile:
        found |= _compile(plan, args.compile)
    if args.json:
        print(json.dumps(found))
    else:
        _print(found)


def _compile(plan: Plan, target: str) -> dict[str, Any]:
    """What the compiler of a slice says of the plan's decoding step."""
    from jaxserve.deployment.compiled import Step, compile_step
    from sharding.compile_only import AbsentCompilerError

    traffic, decode = plan.traffic, plan.decode
    step = Step(
        round(decode.sequences),
        traffic.prompt_len + traffic.output_len,
        "int8" if traffic.eight_bit else None,
        traffic.microbatch and decode.split.expert > 1,
    )
    try:
        compiled = compile_step(plan.shape, _topology(target, "--compile"), decode.split, step)
    except AbsentCompilerError as error:
        raise ConfigError(str(error)) from None
    return compiled.as_dict()


def find(args: argparse.Namespace) -> Plan:
    """The plan that was asked for.

    Raises:
        ConfigError, CheckpointError: there is none; the message has the nearest that there is.
    """
    for option in ("prompt_len", "output_len", "batch", "dp", "ep", "tp"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise ConfigError(f"--{option.replace('_', '-')} {value} must be at least 1")
    if not (args.topology or args.compile):
        raise ConfigError("say what hardware to plan for: --topology NAME_OR_TOML")
    # before jax is imported: a mistyped name is told at once
    target = args.compile and _topology(args.compile, "--compile")
    topology = _topology(args.topology) if args.topology else target

    from jaxserve.deployment import search, shapes
    from jaxserve.deployment.prediction import Traffic

    traffic = Traffic(
        args.prompt_len,
        args.output_len,
        draft=not args.no_mtp,
        microbatch=not args.no_microbatch,
        balanced=args.perfect_eplb,
        eight_bit=not args.bf16,
    )
    wish = search.Wish(args.batch, args.dp, args.ep, args.tp, args.slo_tpot, args.slo_ttft)
    shape = shapes.read(args.model)
    open_ = not (args.topology or args.dp or args.ep or args.tp)
    if args.compile and open_ and shape.cfg.router is not None:
        return search.widest(shape, topology, traffic, wish)
    return search.plan(shape, topology, traffic, wish)


def _topology(text: str, option: str = "--topology") -> Topology:
    from sharding import description, hardware

    try:
        if text.endswith(".toml") or Path(text).is_file():
            return description.load(text)
        return hardware.named(text)
    except FileNotFoundError:
        raise ConfigError(f"{option} {text}: there is no such file") from None
    except ValueError as error:
        raise ConfigError(f"{option} {error}") from None


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"{found['model']} on {found['topology']}, {found['devices']} devices"
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in _rows(found):
        table.add_row(name, value)
    console = Console(highlight=False)
    console.print(table)
    if "target" in found:
        console.print(_compiled_table(found))
    if other := found["runner_up"]:
        console.print(f"runner-up: {other['why']}", markup=False, soft_wrap=True)


def _compiled_table(found: dict[str, Any]) -> Table:
    from rich.table import Table

    gib = 1 << 30
    title = f"its decoding step, compiled for {found['target']} in {found['compile_seconds']:.0f} s"
    table = Table(title=title, title_justify="left", show_header=False)
    fits = "fits" if found["fits"] else "DOES NOT FIT"
    table.add_row("memory", f"{found['bytes_per_device'] / gib:.2f} GiB a device of "
                  f"{found['bytes_available'] / gib:.2f}: {fits}")  # fmt: skip
    for c in found["collectives"]:
        if c["num_bytes"] >= 1 << 16:
            table.add_row(c["kind"], f"{c['count']} x {c['num_bytes']:,} B of {c['dtype']}")
    table.add_row("under collectives", f"{found['overlapped_flops_share']:.0%} of the operations")
    return table


def _rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    npu = found["devices_per_npu"] > 1
    unit = f"{found['devices_per_npu']}-die NPU" if npu else "device"
    of_device = f", {found['tokens_per_s_per_device']:,.0f} a device" if npu else ""
    parts = ", ".join(f"{name} {size:.1f}" for name, size in found["memory_gb"].items() if size)
    streams = "two microbatches" if found["microbatches"] == 2 else "one batch"
    if found["attention_cores"]:
        streams += f", {found['attention_cores']} cores for attention"
    return [
        ("split", _split(found["parallelism"])),
        ("batch", f"{found['batch']} a {unit}, {streams}"),
        ("lengths", f"{found['prompt_len']} in, {found['output_len']} out"),
        ("memory", f"{found['memory_per_device_gb']:.1f} GB a device: {parts}"),
        ("weights", found["weights"]),
        ("first token", f"{found['ttft_ms']:,.0f} ms"),
        ("per token", f"{found['tpot_ms']:.1f} ms, {found['tokens_per_step']:.1f} tokens a step"
                      + ("" if found["in_time"] else "; more than --slo-tpot")),
        ("decode",
         f"{found['decode_tokens_per_s_per_npu']:,.0f} tokens/s a {unit}{of_device}"),
        ("binding", found["binding"]),
        ("prefill", f"{found['prefill_tokens_per_s_per_npu']:,.0f} tokens/s a {unit}, "
                    f"split {_split(found['prefill']['parallelism'])}"),
    ]  # fmt: skip


def _split(parallelism: dict[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in parallelism.items())
