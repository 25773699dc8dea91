"""chat: talk to a model; the whole conversation is sent each time"""

from __future__ import annotations

import argparse
from contextlib import suppress
from typing import Any

from jaxserve.cli.options import (
    add_engine_options,
    add_process_options,
    add_sampling_options,
    load,
    sampling_params,
)
from jaxserve.errors import RequestError
from jaxserve.request import SamplingParams

HELP = "/reset forgets the conversation, /system TEXT also sets the rules, /exit leaves."


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options of this command."""
    parser.add_argument("model", help="a folder with a Hugging Face checkpoint, or a hub id")
    parser.add_argument("--system", default="", help="rules for the model")
    add_sampling_options(parser)
    add_engine_options(parser)
    add_process_options(parser)


def run(args: argparse.Namespace) -> None:
    """Reads, answers, and reads on until the input ends."""
    from rich.console import Console

    with suppress(ImportError):  # line editing and history where the platform has them
        import readline  # noqa: F401
    console = Console(highlight=False)
    params = sampling_params(args)
    with load(args) as llm:
        console.print(HELP, style="dim", markup=False)
        talk = Conversation(llm, params, args.system)
        while (said := _read(console)) is not None:
            if said:
                talk.hear(said, console)


def _read(console: Any) -> str | None:
    """The next line; None at the end."""
    try:
        said = console.input("[bold]> [/bold]").strip()
    except (EOFError, KeyboardInterrupt):
        console.print()
        return None
    return None if said == "/exit" else said


class Conversation:
    """Messages so far, and what to do with the next line."""

    def __init__(self, llm: Any, params: SamplingParams, system: str):
        self._llm, self._params = llm, params
        self.messages: list[dict[str, str]] = []
        self.reset(system)

    def reset(self, system: str) -> None:
        """Forgets everything; `system` is the new rules, if any."""
        self._system = system
        self.messages = [{"role": "system", "content": system}] if system else []

    def hear(self, said: str, console: Any) -> None:
        """A command, or something to answer."""
        command, _, rest = said.partition(" ")
        match command:
            case "/reset":
                self.reset(self._system)
            case "/system":
                self.reset(rest.strip())
            case _ if command.startswith("/"):
                console.print(HELP, style="dim", markup=False)
            case _:
                self._answer(said, console)

    def _answer(self, said: str, console: Any) -> None:
        """Streams the answer. An interrupt ends it, and what was said until then is kept."""
        asked = [*self.messages, {"role": "user", "content": said}]
        text = ""
        try:
            ids = self._llm.encode_chat(asked)
            for delta in self._llm.submit(ids, self._params):
                text += delta.text
                console.print(delta.text, end="", markup=False, soft_wrap=True)
        except KeyboardInterrupt:
            console.print(" [interrupted]", style="dim", markup=False, end="")
        except RequestError as error:  # such as a conversation that has grown too long
            console.print(f"{error}\n{HELP}", style="red", markup=False)
            return
        console.print()
        self.messages = [*asked, {"role": "assistant", "content": text}]
