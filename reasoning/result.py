"""What a search may spend, and what comes of it."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Literal

from jaxserve.protocol import Ledger, Node
from reasoning import drawing

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table
    from rich.text import Text
    from rich.tree import Tree

Stopped = Literal["done", "budget", "decided"]

_queries = itertools.count()


def next_query() -> int:
    """A number for a search that no other one of this process was given."""
    return next(_queries)


@dataclass(frozen=True)
class Budget:
    """What a query may spend; it ends with the answer it has once one of these is gone.

    Attributes:
        tokens: generated for the search, extra passes among them; speculation that nobody used is
            counted in the ledger and not here, so that it cannot change an answer.
        paths: forks that are extended.
        seconds: of wall time.
        decision: seconds that the controller may take to decide once. A query whose controller
            takes longer fails: there is no answer then.
    """

    tokens: int = 1 << 30
    paths: int = 1 << 30
    seconds: float = float("inf")
    decision: float = 60.0

    def __post_init__(self):
        if min(self.tokens, self.paths, self.seconds, self.decision) <= 0:
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

    @property
    def tokens(self) -> tuple[int, ...]:
        """What `best` says, from its first token behind the prompt on."""
        pieces = {piece.node: piece for piece in self.tree}
        way, node = list[Piece](), self.best
        while node is not None and node in pieces:
            way.append(pieces[node])
            node = pieces[node].parent
        found: tuple[int, ...] = ()
        for piece in reversed(way):
            if piece.parent is not None:  # the root is the prompt
                at = piece.node.path[-1][1]
                found = (*(found if at < 0 else found[:at]), *piece.tokens)
        return found

    @property
    def headline(self) -> str:
        """One line: what was found, by whom, and at what cost."""
        whole = sum(self.distribution.values())
        share = f" ({max(self.distribution.values()) / whole:.0%} of the vote)" if whole else ""
        found = "no answer" if self.answer is None else f"{self.answer}{share}"
        return (
            f"{found}: {self.controller}, {self.stopped}, "
            f"{self.ledger.committed + self.ledger.effective} tokens"
        )

    def __rich__(self) -> Group:
        """For a terminal: `rich.print(result)`."""
        from rich.console import Group
        from rich.text import Text

        parts: list[RenderableType] = [Text(self.headline, style="bold"), self._ledger_table()]
        if self.distribution:
            parts += ["", self._answer_table()]
        if self.tree:
            parts += ["", self._rich_tree()]
        return Group(*parts)

    def _repr_html_(self) -> str:
        """For a notebook: one picture, and no script."""
        costs = ", ".join(f"{name} {value}" for name, value in self._costs())
        return (
            f"<div><b>{escape(self.headline)}</b><br/><small>{costs}</small>"
            f"{drawing.bars(self.distribution)}{drawing.svg(self.tree, self.answer)}</div>"
        )

    def _costs(self) -> list[tuple[str, str]]:
        """What is not nothing in the ledger."""
        shown = {name: value for name, value in vars(self.ledger).items() if value}
        return [(name.replace("_", " "), f"{value:g}") for name, value in shown.items()]

    def _ledger_table(self) -> Table:
        from rich.table import Table

        table = Table(*[name for name, _ in self._costs()], box=None)
        table.add_row(*[value for _, value in self._costs()])
        return table

    def _answer_table(self, most: int = 8) -> Table:
        from rich.table import Table

        table = Table("answer", "weight", "share", "", box=None)
        whole = sum(self.distribution.values()) or 1.0
        for answer, weight in list(self.distribution.items())[:most]:
            share = weight / whole
            bar = "━" * max(round(24 * share), 1)
            table.add_row(_plain(answer), f"{weight:.3g}", f"{share:.0%}", f"[green]{bar}[/]")
        return table

    def _rich_tree(self, most: int = 40) -> Tree:
        """So many pieces; a search may have thousands."""
        from rich.tree import Tree

        whole = Tree("question", guide_style="dim")
        at = dict[Node | None, Tree]()
        drawn = drawing.lines(self.tree, most)
        for line in drawn:
            piece = line.piece
            above = at.get(piece.parent, whole)
            at[piece.node] = whole if piece.parent is None else above.add(_label(piece))
        if len(self.tree) > len(drawn):
            whole.add(f"[dim]and {len(self.tree) - len(drawn)} more[/]")
        return whole


def _label(piece: Piece) -> Text:
    """One line: what it came to first, since a terminal may have no room for all it says."""
    from rich.text import Text

    styles = {"live": "blue", "finished": "green", "pruned": "dim", "wasted": "red"}
    score = "" if piece.score is None else f" {piece.score:.3f}"
    line = Text.assemble((piece.state, styles[piece.state]), score, no_wrap=True)
    if piece.answer is not None:
        line.append(f" → {piece.answer}", style="bold")
    count = len(piece.tokens)
    said = " ".join(piece.text.split()) or f"{count} token{'' if count == 1 else 's'}"
    line.append(f"  {said}")
    line.overflow = "ellipsis"
    return line


def _plain(value: object) -> str:
    """Text in which rich finds no markup of its own."""
    return str(value).replace("[", r"\[")
