"""Structured outputs of a model that reasons: the answer obeys the grammar, the reasoning does not.

As in vLLM, a grammar begins where `</think>` ends. If the prompt has closed the reasoning already,
it begins with the first token; if the prompt leaves it open whether the model reasons, the first
token decides: `<think>`, or the beginning of the answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from jaxserve.request import StructuredOutputs
from jaxserve.text.parsers.reasoning import CLOSE, OPEN, reasoning_state
from jaxserve.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from jaxserve.text.grammar import Grammar, Matcher

_CLOSE = CLOSE.encode()


class MayReason(StructuredOutputs):
    """A constraint on an answer, before which the model may open a reasoning section."""

    inside = False


class Reasons(MayReason):
    """A constraint on an answer; the prompt ends within the reasoning section before it."""

    inside = True


def constrain_answer(outputs: StructuredOutputs, prompt: str | None) -> StructuredOutputs:
    """The constraint on what follows the reasoning that this prompt leaves room for."""
    state = reasoning_state(prompt or "")
    if state == "closed":
        return outputs
    return (Reasons if state == "inside" else MayReason)(**vars(outputs))


class AnswerGrammar:
    """A compiled grammar of answers."""

    def __init__(self, grammar: Grammar, tokenizer: Tokenizer, inside: bool):
        self._grammar, self._inside = grammar, inside
        self._bytes = tokenizer.token_bytes.table(skip_special_tokens=False)
        self._opening = None if inside else tokenizer.backend.token_to_id(OPEN)

    def matcher(self) -> AnswerMatcher:
        """A matcher at the beginning of the text. Takes microseconds."""
        return AnswerMatcher(self._grammar.matcher(), self._bytes, self._opening, self._inside)


class AnswerMatcher:
    """A `Matcher` that lets reasoning pass, and then asks another one.

    The end is found in the text, not by its id, so that a model may also spell it.

    Args:
        answer: stands at the beginning of the answer.
        token_bytes: what each token adds to the text.
        opening: the token that may open the reasoning at the beginning; None if none may.
        inside: the text begins within the reasoning.
    """

    def __init__(
        self, answer: Matcher, token_bytes: dict[int, bytes], opening: int | None, inside: bool
    ):
        self._answer, self._bytes = answer, token_bytes
        self._opening, self._inside = opening, inside
        self._tail = b""  # of the reasoning

    @property
    def finished(self) -> bool:
        return not self._inside and self._answer.finished

    def fill(self, mask: NDArray[Any]) -> None:
        """As `Matcher.fill`: everything may come next within the reasoning."""
        if self._inside:
            mask.fill(~mask.dtype.type(0))
            return
        self._answer.fill(mask)
        if self._opening is not None and self._opening // 32 < len(mask):
            mask.view("<u4")[self._opening // 32] |= 1 << self._opening % 32

    def accept(self, token: int) -> bool:
        """As `Matcher.accept`; False also for a token that ends the reasoning and goes on."""
        opening, self._opening = self._opening, None
        if self._inside:
            return self._reason(token)
        self._inside = token == opening
        return self._inside or self._answer.accept(token)

    def fork(self) -> AnswerMatcher:
        """An independent matcher that stands at the same place."""
        other = AnswerMatcher(self._answer.fork(), self._bytes, self._opening, self._inside)
        other._tail = self._tail
        return other

    def _reason(self, token: int) -> bool:
        self._tail += self._bytes[token]
        _, closed, rest = self._tail.partition(_CLOSE)
        self._inside = not closed
        self._tail = self._tail[-len(_CLOSE) :]
        return not rest.strip()
