"""The model's own notation for reasoning and tool calls, read by its parser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxserve.server.pieces import Parser, Plain
from jaxserve.server.state import Server


def model_parser(server: Server, tools: list[dict[str, Any]] | None) -> Callable[[], Parser]:
    """What makes a parser for this server's model; `tools` is None where none may be called."""
    return Plain


def tool_parser_missing(server: Server) -> str | None:
    """Why this server cannot read tool calls; None if it can."""
    return None
