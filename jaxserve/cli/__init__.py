"""`jaxserve serve | generate | chat | search | train | quantize | bench | doctor | plan`.

Here the parts are put together. Each command is a module that says which options it takes and runs
them. None of them imports jax before it runs, so that `--help` and a mistyped option are answered
at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from jaxserve import __version__
from jaxserve.cli import bench, chat, doctor, generate, plan, quantize, search, serve, train
from jaxserve.cli.huge_pages import restart_with_huge_pages
from jaxserve.cli.processes import follow, joined
from jaxserve.errors import JaxServeError

COMMANDS = (serve, generate, chat, search, train, quantize, bench, doctor, plan)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code: 0, 1 after an error, 2 for a mistyped option.

    Args:
        argv: the arguments; those of the process by default.
    """
    args = parser().parse_args(argv)
    if argv is None and args.run is train.run:
        restart_with_huge_pages()
    if args.verbose:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    try:
        return (follow if joined(args) else args.run)(args) or 0
    except JaxServeError as error:
        if args.verbose:
            raise
        from rich.console import Console

        console = Console(stderr=True, soft_wrap=True)
        console.print(f"error: {error}", style="bold red", markup=False, highlight=False)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `jaxserve … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(prog="jaxserve", description="Serve language models with JAX.")
    top.add_argument("--version", action="version", version=f"jaxserve {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for module in COMMANDS:
        name = module.__name__.rpartition(".")[2]
        summary = (module.__doc__ or "").partition("\n")[0].partition(": ")[2]
        command = commands.add_parser(
            name,
            help=summary,
            description=summary,
            formatter_class=_Help,
        )
        command.add_argument("--verbose", action="store_true", help="show logs and tracebacks")
        module.add_options(command)
        command.set_defaults(run=module.run)
    return top


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Prints the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is False or action.default in (None, [], "")
        return action.help if silent else super()._get_help_string(action)
