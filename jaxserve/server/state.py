"""What every handler can reach: the server's parts, and the exchange it is answering."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from jaxserve.errors import ConfigError
from jaxserve.server.errors import ApiError
from jaxserve.server.gate import Gate
from jaxserve.server.metrics import Metrics
from jaxserve.server.parsing import Notation


@dataclass(frozen=True)
class Limits:
    """What one client may ask for.

    Attributes:
        max_body_bytes: larger bodies are answered 413.
        max_prompt_tokens: longer prompts are refused; None allows the whole context.
        max_concurrent_requests: more at once are answered 429.
        max_choices: prompts times `n` of one request.
    """

    max_body_bytes: int = 32 * 2**20
    max_prompt_tokens: int | None = None
    max_concurrent_requests: int = 4096
    max_choices: int = 4096

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1")


@dataclass(frozen=True)
class Server:
    """The parts of one app; the app holds it as `app.state.server`.

    Attributes:
        llm: the engine's facade.
        names: what requests may call the model; answers use the first.
        notation: how the model writes reasoning and tool calls.
        created: when the app was made, in seconds since the epoch.
        workers: threads that tokenise and submit.
        compilers: threads for requests whose grammar must be compiled first.
    """

    llm: Any
    names: tuple[str, ...]
    limits: Limits
    gate: Gate
    metrics: Metrics
    created: int
    notation: Notation
    workers: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(4, "submit"))
    compilers: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(4, "grammar"))

    def check_model(self, name: str | None) -> str:
        """The model's name as answers print it; 404 for one that is not served."""
        if name is not None and name not in self.names:
            served = ", ".join(repr(n) for n in self.names)
            raise ApiError(
                404,
                f"the model {name!r} does not exist; this server has {served}",
                param="model",
                code="model_not_found",
            )
        return name or self.names[0]

    def check_choices(self, num_prompts: int, n: int) -> None:
        """Refuses a request that asks for more choices than one request may."""
        if num_prompts * n > self.limits.max_choices:
            raise ApiError(
                400,
                f"{num_prompts} prompts with n={n} are {num_prompts * n} choices, at most "
                f"{self.limits.max_choices} are allowed in one request; send several requests",
                param="n",
            )


@dataclass(frozen=True)
class Exchange:
    """One request being answered. What `stack` holds is undone after the response or a hang-up."""

    server: Server
    request: Request
    stack: AsyncExitStack
