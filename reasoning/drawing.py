"""A search as a picture: its paths from left to right, forking where they fork."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reasoning.result import Piece

COLOURS = {"live": "#4c78a8", "finished": "#54a24b", "pruned": "#b0b0b0", "wasted": "#e45756"}
WIDTH, ROW, MARGIN = 640, 14, 12
MOST = 200  # rows of one picture


@dataclass(frozen=True)
class Line:
    """Where a piece is drawn: tokens from the question on, and its row."""

    piece: Piece
    start: int
    end: int
    row: int


def lines(tree: Sequence[Piece], most: int = MOST) -> list[Line]:
    """A row for each piece, children below their parent in the order in which they were made.

    Args:
        most: rows. Of a larger tree, what led to answers is shown before the rest.
    """
    children: dict[object, list[Piece]] = {}
    for piece in tree if len(tree) <= most else _notable(tree, most):
        children.setdefault(piece.parent, []).append(piece)
    drawn, waiting = list[Line](), [(piece, 0) for piece in reversed(children.get(None, []))]
    while waiting:
        piece, parent_end = waiting.pop()
        at = piece.node.path[-1][1] if piece.node.path else -1
        start = at if at >= 0 else parent_end
        end = start + len(piece.tokens) if piece.node.path else 0  # a question has no length
        drawn.append(Line(piece, start, end, len(drawn)))
        waiting += [(child, end) for child in reversed(children.get(piece.node, []))]
    return drawn


def _notable(tree: Sequence[Piece], most: int) -> list[Piece]:
    known, kept = {piece.node: piece for piece in tree}, set[object]()
    for piece in sorted(tree, key=lambda p: p.answer is None):
        way, above = list[object](), piece
        while above is not None and above.node not in kept:
            way.append(above.node)
            above = known.get(above.parent) if above.parent is not None else None
        if len(kept) + len(way) <= most:
            kept.update(way)
    return [piece for piece in tree if piece.node in kept]


def svg(tree: Sequence[Piece], answer: Hashable | None) -> str:
    """The tree as an SVG element; what a piece says appears when it is pointed at."""
    shown = lines(tree)
    hidden = len(tree) - len(shown)
    scale = (WIDTH - 8 * MARGIN) / max(max((line.end for line in shown), default=0), 1)
    rows = {line.piece.node: line.row for line in shown}
    parts = list[str]()
    for line in shown:
        x0, x1 = MARGIN + line.start * scale, MARGIN + line.end * scale
        y = MARGIN + line.row * ROW
        parts.append(f"<g><title>{escape(_title(line.piece))}</title>")
        if line.piece.parent in rows:
            top = MARGIN + rows[line.piece.parent] * ROW
            parts.append(f'<path d="M{x0:.1f} {top}V{y}" stroke="#cccccc" fill="none"/>')
        parts.append(_stroke(line.piece, x0, x1, y, line.piece.answer == answer))
        parts.append("</g>")
    height = 2 * MARGIN + len(shown) * ROW
    if hidden:
        parts.append(f'<text x="{MARGIN}" y="{height - 2}">and {hidden} more</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'font-family="sans-serif" font-size="10" fill="currentColor">{"".join(parts)}</svg>'
    )


def bars(distribution: Mapping[Hashable, float], most: int = 8) -> str:
    """The weight behind each answer as a table."""
    whole = sum(distribution.values()) or 1.0
    rows = list[str]()
    for answer, weight in list(distribution.items())[:most]:
        look = f"background:{COLOURS['finished']};height:0.8em;width:{200 * weight / whole:.0f}px"
        cells = (escape(str(answer)), f'<div style="{look}"></div>', f"{weight / whole:.0%}")
        rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return f"<table>{''.join(rows)}</table>"


def _stroke(piece: Piece, x0: float, x1: float, y: int, wins: bool) -> str:
    bold = piece.answer is not None and wins
    line = (
        f'<path d="M{x0:.1f} {y}H{x1:.1f}" stroke="{COLOURS[piece.state]}" '
        f'stroke-width="{4 if bold else 2}"/>'
    )
    if piece.answer is None:
        return line
    weight = "bold" if bold else "normal"
    label = escape(str(piece.answer)[:12])
    return f'{line}<text x="{x1 + 4:.1f}" y="{y + 3}" font-weight="{weight}">{label}</text>'


def _title(piece: Piece) -> str:
    score = "" if piece.score is None else f", score {piece.score:.3f}"
    return f"{piece.state}, {len(piece.tokens)} tokens{score}\n{piece.text}"
