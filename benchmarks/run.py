"""A named suite of measurements: `python -m benchmarks.run SUITE`; one JSON line each on stdout.

Models are made on first use, under benchmarks/models. Peers that are not installed are reported
and left out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from benchmarks.records import ROOT

MODELS = ROOT / "benchmarks" / "models"
PEERS = ["transformers-f32", "transformers-bf16", "openvino-bf16", "vllm-bf16"]

Command = tuple[str, str, list[str]]
"""Module, model shape, further arguments."""

SUITES: dict[str, list[Command]] = {
    "quick": [
        ("offline", "qwen3-120m", ["--rounds", "1", "--workloads", "single_decode", "ttft_32"])
    ],
    "offline": [
        ("offline", shape, []) for shape in ("qwen3-120m", "qwen3-moe-166m", "deepseek-v3-tiny")
    ],
    "peers-dense": [("compare", "qwen3-120m", [*PEERS, "jaxserve-bf16", "--starts", "3"])],
    "peers-moe": [("compare", "qwen3-moe-166m", [*PEERS, "jaxserve-bf16", "--starts", "3"])],
    "peers-0.6b": [("compare", "qwen3-0.6b", [*PEERS, "jaxserve-bf16"])],
}


def _python(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", f"benchmarks.{module}", *arguments], cwd=ROOT, check=True)


def run(suite: str) -> None:
    for module, shape, arguments in SUITES[suite]:
        folder = MODELS / shape
        if not (folder / "config.json").exists():
            _python("make_model", shape, str(folder))
        _python(module, str(folder), *arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", choices=sorted(SUITES))
    run(parser.parse_args().suite)


if __name__ == "__main__":
    main()
