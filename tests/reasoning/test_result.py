"""A result shows itself, in a terminal and in a notebook."""

from __future__ import annotations

import asyncio
import io
from xml.etree import ElementTree

import pytest
from rich.console import Console

from jaxserve.protocol import Ledger, Node
from reasoning import drawing
from reasoning.controllers.self_consistency import SelfConsistency
from reasoning.pool import run_pool
from reasoning.result import Budget, Piece, Result
from tests.reasoning.fake_pool import QUESTION, FakePool, text


def piece(*path: tuple[int, int], tokens: int = 4, **fields) -> Piece:
    node = Node(0, path)
    parent = Node(0, path[:-1]) if path else None
    about = {"text": "", "score": None, "answer": None, "state": "finished"} | fields
    return Piece(node, parent, (1,) * tokens, **about)  # pyright: ignore[reportArgumentType]


TREE = (
    piece(tokens=7),
    piece((0, -1), text="a <b> & [c]", answer="<7>", score=0.25),
    piece((1, -1), state="pruned"),
    piece((0, -1), (5, 2), tokens=3, answer="8"),
    piece((2, -1), state="live"),
    piece((3, -1), state="wasted"),
)
RESULT = Result(
    "<7>", {"<7>": 2.0, "8": 1.0}, Ledger(committed=15, effective=3), "done", "x", tree=TREE
)


def shown(result: Result, width: int = 100) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(result)
    return out.getvalue()


def test_a_terminal_shows_answer_ledger_votes_and_tree():
    text = shown(RESULT)
    assert "<7> (67% of the vote): x, done, 18 tokens" in text
    assert "committed" in text and "effective" in text and "peak" not in text
    assert "a <b> & [c]" in text, "rich takes no text for markup"
    for state in ("finished", "pruned", "live", "wasted"):
        assert state in text


def test_a_notebook_shows_a_picture_that_is_well_formed():
    html = RESULT._repr_html_()
    root = ElementTree.fromstring(html)
    svg = next(e for e in root if e.tag.endswith("svg"))
    titles = [e.text for e in svg.iter() if e.tag.endswith("title")]
    assert len(titles) == len(TREE)
    assert any("a <b> & [c]" in (title or "") for title in titles)
    assert "<script" not in html and "http://www.w3.org/2000/svg" in html


def test_branches_leave_their_parent_where_they_were_forked():
    drawn = {line.piece.node.path: line for line in drawing.lines(TREE)}
    assert (drawn[()].start, drawn[()].end) == (0, 0)
    assert (drawn[((0, -1),)].start, drawn[((0, -1),)].end) == (0, 4)
    branch = drawn[((0, -1), (5, 2))]
    assert (branch.start, branch.end) == (2, 5)
    assert branch.row == drawn[((0, -1),)].row + 1, "below its parent"


def test_an_empty_result_shows_itself_too():
    empty = Result(None, {}, Ledger(), "done", "x")
    assert "no answer: x, done, 0 tokens" in shown(empty)
    ElementTree.fromstring(empty._repr_html_())


def test_large_trees_are_cut_short():
    tree = (piece(), *(piece((i, -1), text=f"path {i}") for i in range(500)))
    result = Result(None, {}, Ledger(), "budget", "x", tree=tree)
    assert "and 461 more" in shown(result)
    assert "and 301 more" in result._repr_html_()
    assert len(result._repr_html_()) < 100_000


def test_results_of_searches_show_themselves():
    pool = FakePool([text(4), text(5), text(4)])
    result = asyncio.run(run_pool(SelfConsistency(paths=3), pool, QUESTION, Budget(), query=0))
    assert "4 (67% of the vote): self-consistency, done, 24 tokens" in shown(result)
    ElementTree.fromstring(result._repr_html_())


@pytest.mark.parametrize("field", ["tokens", "paths", "seconds"])
def test_budgets_are_positive(field: str):
    with pytest.raises(ValueError, match="positive"):
        Budget(**{field: 0})


def test_of_a_large_tree_ways_to_answers_are_drawn():
    dead = [piece((i, -1), state="pruned") for i in range(300)]
    way, end = piece((300, -1), state="pruned"), piece((300, -1), (0, -1), answer=7)
    drawn = [line.piece for line in drawing.lines([piece(), *dead, way, end], 40)]
    assert len(drawn) == 40 and drawn[-2:] == [way, end]
