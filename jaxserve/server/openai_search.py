"""What a request may say about a search for its answer, and what is said of it; ours alone.

`search` is a field of `/v1/completions` and `/v1/chat/completions`, and of their answers.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, UnsetType

from jaxserve.request import Asked
from jaxserve.server.sampling import Positive
from jaxserve.server.wire import TokenId


class SelfEvaluated(Struct, kw_only=True, forbid_unknown_fields=True):
    """A scorer: how likely the model answers `yes` rather than `no` to a question about a path.

    Attributes:
        question: that follows the path's text.
        yes, no: each a single token of the model.
    """

    question: str = Asked.question
    yes: str = Asked.yes
    no: str = Asked.no


class SearchOptions(Struct, kw_only=True, forbid_unknown_fields=True):
    """How to search. The request's `max_tokens` is the most of one path.

    Attributes:
        controller: its name, as `jaxserve search --help` lists them.
        settings: of the controller.
        tokens, paths, seconds: what may be spent.
        step: text of the token that closes a step, or the ids of such tokens; an empty line if a
            controller needs steps and this says nothing.
        scorer: of paths: "prm", "confidence", "certainty" or "self-evaluation", or what the model
            is to be asked about them; the reward head if there is one, else confidence.
        speculate: runs ahead of a search over steps, in this mode.
        seed: of everything that is drawn; the request's `seed`, or 0.
    """

    controller: str = "hyper"
    settings: dict[str, Any] = {}
    tokens: Positive = 4096
    paths: Positive | None = None
    seconds: Annotated[float, Meta(gt=0)] | None = None
    step: str | list[TokenId] | None = None
    scorer: str | SelfEvaluated | None = None
    speculate: Literal["lossless", "paper", "opportunistic"] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None


class SearchEvent(Struct, kw_only=True, omit_defaults=True):
    """Something that happened to a path.

    Attributes:
        kind: "step": it has grown; "score": a scorer has spoken; "cancelled": it was given up;
            "failed": it cannot go on, as `message` says.
        path: `(index, at)` of every fork on the way to it; at -1 is the parent's end.
        tokens: that were added.
        text: of these.
    """

    kind: Literal["step", "score", "cancelled", "failed"]
    path: list[tuple[int, int]]
    tokens: int | None = None
    text: str | None = None
    scorer: str | None = None
    score: float | None = None
    message: str | None = None


class SearchLedger(Struct, kw_only=True):
    """Where the tokens went: `generated = committed + spec_waste`."""

    generated: int
    committed: int
    spec_hit: int
    spec_waste: int
    effective: int
    prefill: int
    scorer: int
    calls: int
    critical_steps: float
    peak_pages: int


class SearchReport(Struct, kw_only=True):
    """What a search came to.

    Attributes:
        answer: as text; null if no path came to one.
        distribution: the weight behind each answer, heaviest first.
        stopped: "done": the controller was; "budget": it was cut short; "decided": no vote to come
            could have changed the answer.
        mode: of speculation; "off" without.
    """

    answer: str | None
    distribution: dict[str, float]
    controller: str
    mode: Literal["off", "lossless", "paper", "opportunistic"]
    stopped: Literal["done", "budget", "decided"]
    ledger: SearchLedger


Reported = SearchReport | UnsetType
"""Of an answer; absent where nobody asked for a search."""

Told = SearchEvent | UnsetType
"""Of a frame of a stream; absent where nothing happened."""
