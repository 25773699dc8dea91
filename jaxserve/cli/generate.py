"""generate: continue a prompt and print the text as it comes"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from jaxserve.cli.options import (
    add_engine_options,
    add_process_options,
    add_sampling_options,
    load,
    sampling_params,
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options of this command."""
    parser.add_argument("model", help="a folder with a Hugging Face checkpoint, or a hub id")
    parser.add_argument("prompt", help="the text to continue; - reads it from standard input")
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's message")
    parser.add_argument("--json", action="store_true", help="print the whole result as JSON")
    add_sampling_options(parser)
    add_engine_options(parser)
    add_process_options(parser)


def run(args: argparse.Namespace) -> None:
    """Prints the text, or with `--json` one line with everything known about it."""
    params = sampling_params(args)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    with load(args) as llm:
        if args.chat:
            ids = llm.encode_chat([{"role": "user", "content": prompt}])
        else:
            ids = llm.tokenizer.encode(prompt)
        generation = llm.submit(ids, params, prompt=prompt)
        if args.json:
            print(json.dumps(dataclasses.asdict(generation.result()), ensure_ascii=False))
            return
        for delta in generation:
            print(delta.text, end="", flush=True)
        print()
