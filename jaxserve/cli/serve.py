"""serve: answer HTTP requests in OpenAI's and Anthropic's protocols

The port is bound before the model is loaded, so that a taken one is noticed at once; it is listened
on afterwards, so that nobody is kept waiting.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from jaxserve.cli.options import add_engine_options, add_process_options, load
from jaxserve.errors import ConfigError
from jaxserve.text.parsers import REASONING_PARSERS, TOOL_CALL_PARSERS


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options of this command."""
    parser.add_argument("model", help="a folder with a Hugging Face checkpoint, or a hub id")
    http = parser.add_argument_group("http")
    http.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    http.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    http.add_argument("--api-key", action="append", help="asked of clients; or JAXSERVE_API_KEY")
    http.add_argument(
        "--served-model-name", action="append", help="what requests may call it; repeatable"
    )
    http.add_argument("--max-body-mib", type=int, default=32, help="larger bodies are refused")
    http.add_argument("--max-prompt-tokens", type=int, help="longer prompts are refused")
    http.add_argument(
        "--max-concurrent-requests", type=int, default=4096, help="more at once are turned away"
    )
    http.add_argument(
        "--drain-timeout", type=float, default=30.0, help="seconds for running requests at the end"
    )
    text = parser.add_argument_group("text")
    text.add_argument(
        "--tool-call-parser", choices=TOOL_CALL_PARSERS, help="notation of calls; else the family's"
    )
    text.add_argument(
        "--reasoning-parser", choices=REASONING_PARSERS, help="notation of reasoning, likewise"
    )
    text.add_argument("--chat-template", metavar="FILE", help="instead of the checkpoint's own")
    add_engine_options(parser)
    add_process_options(parser)


def run(args: argparse.Namespace) -> None:
    """Serves until a signal, then lets running requests finish."""
    from rich.console import Console

    from jaxserve.server.app import create_app
    from jaxserve.server.run import bind, run, url_of
    from jaxserve.server.state import Limits

    limits = Limits(
        max_body_bytes=args.max_body_mib * 2**20,
        max_prompt_tokens=args.max_prompt_tokens,
        max_concurrent_requests=args.max_concurrent_requests,
    )
    with bind(args.host, args.port) as listener, load(args) as llm:
        if args.chat_template is not None:
            llm.tokenizer.chat_templates = {"default": _template(args.chat_template)}
        app = create_app(
            llm,
            api_key=args.api_key or os.environ.get("JAXSERVE_API_KEY"),
            served_model_name=args.served_model_name,
            limits=limits,
            tool_call_parser=args.tool_call_parser,
            reasoning_parser=args.reasoning_parser,
        )
        names = ", ".join(app.state.server.names)
        console = Console(stderr=True, soft_wrap=True, highlight=False)
        console.print(f"jaxserve: serving {names} at {url_of(listener)}/v1", markup=False)
        run(app, listener, drain_timeout=args.drain_timeout)
        console.print("jaxserve: drained and closed")


def _template(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template {file} cannot be read: {error}") from None
