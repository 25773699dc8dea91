"""What a search may spend, and what comes of it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from jaxserve.protocol import Ledger, Node

Stopped = Literal["done", "budget", "decided"]


@dataclass(frozen=True)
class Budget:
    """What a query may spend; it ends with the answer it has once one of these is gone.

    Attributes:
        tokens: generated for the search, extra passes among them; speculation that nobody used is
            counted in the ledger and not here, so that it cannot change an answer.
        paths: forks that are extended.
        seconds: of wall time.
    """

    tokens: int = 1 << 30
    paths: int = 1 << 30
    seconds: float = float("inf")

    def __post_init__(self):
        if min(self.tokens, self.paths, self.seconds) <= 0:
            raise ValueError(f"{self}: every part of a budget must be positive")


@dataclass(frozen=True)
class Piece:
    """One extension of a path, as a result shows it.

    Attributes:
        parent: of the node that it belongs to; None for the root.
        score: what was thought of the path behind it; None if nobody was asked.
        state: "live" at the end of the search, "finished" with an answer or without, "pruned" on
            purpose, or "wasted": speculation that nobody used.
    """

    node: Node
    parent: Node | None
    tokens: tuple[int, ...]
    text: str
    score: float | None
    answer: Hashable | None
    state: Literal["live", "finished", "pruned", "wasted"]


@dataclass(frozen=True)
class Result:
    """The end of a search.

    Attributes:
        answer: None if no path came to one.
        distribution: the weight behind each answer, heaviest first.
        best: the path that stands for the answer.
        stopped: "done": the controller was; "budget": it was cut short; "decided": no vote to come
            could have changed the answer.
        tree: its pieces in the order in which they were made.
        mode: how speculation took part ("off", "lossless", "paper", "opportunistic").
    """

    answer: Hashable | None
    distribution: Mapping[Hashable, float]
    ledger: Ledger
    stopped: Stopped
    controller: str
    best: Node | None = None
    tree: tuple[Piece, ...] = ()
    mode: Literal["off", "lossless", "paper", "opportunistic"] = "off"
    notes: Mapping[str, float] = field(default_factory=dict[str, float])
