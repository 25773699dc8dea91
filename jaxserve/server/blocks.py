"""Pieces as a row of blocks, one open at a time: what Responses and Messages both stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from jaxserve.request import TokenLogprobs
from jaxserve.server.pieces import Piece, new_id

Kind = Literal["reasoning", "text", "call"]


@dataclass(slots=True)
class Block:
    """A run of reasoning, of text, or one tool call; it grows until it is closed.

    Attributes:
        text: the text, or a call's arguments.
        name: the function called.
        call_id: the call's name.
        tokens: with log-probabilities, the tokens of a text block.
    """

    index: int
    kind: Kind
    text: str = ""
    name: str = ""
    call_id: str = ""
    tokens: list[tuple[int, TokenLogprobs]] = field(default_factory=list)
    closed: bool = False
    id: str = field(default_factory=lambda: new_id(""))


@dataclass(slots=True)
class BlockEvent:
    """A block opened, grew by `text`, or closed."""

    what: Literal["open", "grow", "close"]
    block: Block
    text: str = ""
    tokens: list[tuple[int, TokenLogprobs]] = field(default_factory=list)


class Blocks:
    """Cuts the pieces of one choice into blocks."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self._tokens: list[tuple[int, TokenLogprobs]] = []  # not yet shown as text

    def add(self, piece: Piece) -> Iterator[BlockEvent]:
        """What `piece` does to the blocks."""
        self.finish_reason, self.stop_reason = piece.finish_reason, piece.stop_reason
        self._tokens += zip(piece.token_ids, piece.logprobs or (), strict=False)
        if piece.reasoning:
            yield from self._grow("reasoning", piece.reasoning)
        if piece.text:
            yield from self._grow("text", piece.text)
        for call in piece.calls:
            if call.name is not None:
                yield from self._open(Block(0, "call", name=call.name, call_id=call.id or ""))
            if call.arguments:
                yield from self._grow("call", call.arguments)
        if piece.visible:
            self._tokens = []
        if piece.finish_reason is not None:
            yield from self._close()

    def _grow(self, kind: Kind, text: str) -> Iterator[BlockEvent]:
        if not self.blocks or self.blocks[-1].kind != kind or self.blocks[-1].closed:
            yield from self._open(Block(0, kind))
        block = self.blocks[-1]
        tokens = self._tokens if kind == "text" else []
        block.text += text
        block.tokens += tokens
        yield BlockEvent("grow", block, text, tokens)

    def _open(self, block: Block) -> Iterator[BlockEvent]:
        yield from self._close()
        block.index = len(self.blocks)
        self.blocks.append(block)
        yield BlockEvent("open", block)

    def _close(self) -> Iterator[BlockEvent]:
        if self.blocks and not self.blocks[-1].closed:
            self.blocks[-1].closed = True
            yield BlockEvent("close", self.blocks[-1])
