"""Tokens to text while they arrive: only what can no longer change, and never past a stop string.

`tokenizers.DecodeStream` was considered: it cannot be flushed, and after a malformed character it
falls silent. A table of bytes is exact, and as fast.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from jaxserve.text.tokenizer import Tokenizer

_Utf8 = codecs.getincrementaldecoder("utf-8")
_LONGEST_CHARACTER = 4  # bytes


class Detokenizer:
    """The text of one completion, piece by piece.

    Joined, the pieces are the text that the tokens add to the prompt's, cut at the first stop
    string to be completed (of two completed by the same character, the longer).

    Args:
        prompt_ids: only their end is read: it may hold the first bytes of a character.
        stop: strings that end the text.
        include_stop: whether the stop string itself belongs to the text.
        min_tokens: a stop string completed within so many tokens does not count.

    Attributes:
        stopped_by: the stop string that ended the text, once one has.
        consumed: how many tokens of the last `push` belong to the text; all, unless it stopped.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ):
        self.stopped_by: str | None = None
        self.consumed = 0
        self._bytes = tokenizer.token_bytes
        self._table = self._bytes.table(skip_special_tokens)
        self._skip = skip_special_tokens
        self._utf8 = _Utf8("replace")
        self._at_start = not any(self._bytes.appears(i, self._skip) for i in reversed(prompt_ids))
        self._utf8.decode(self._end_of(prompt_ids))
        self._stop = tuple(stop)
        self._openers = frozenset(s[0] for s in stop)
        self._include_stop = include_stop
        self._unstoppable = min_tokens
        self._held = ""  # decoded, but it may yet become a stop string

    def push(self, token_ids: Sequence[int]) -> str:
        """Adds tokens and returns the text that is now final. Ignored once stopped."""
        self.consumed = 0
        if self.stopped_by is not None:
            return ""
        if not self._stop:
            self.consumed = len(token_ids)
            return self._utf8.decode(self._bytes_of(token_ids))
        pieces: list[str] = []
        for token in token_ids:  # one by one, to know which of them completed a stop string
            self.consumed += 1
            pieces.append(self._release(self._utf8.decode(self._bytes_of((token,)))))
            if self.stopped_by is not None:
                break
        return "".join(pieces)

    def flush(self) -> str:
        """The rest, when no token will follow: an unfinished character becomes U+FFFD."""
        if self.stopped_by is not None:
            return ""
        text = self._release(self._utf8.decode(b"", final=True))
        rest, self._held = self._held, ""
        return text + rest

    def _bytes_of(self, ids: Sequence[int]) -> bytes:
        if not self._at_start:
            return (
                self._table[ids[0]]
                if len(ids) == 1
                else b"".join(map(self._table.__getitem__, ids))
            )
        self._at_start = not any(self._bytes.appears(i, self._skip) for i in ids)
        return self._bytes.join(ids, self._skip)

    def _end_of(self, prompt_ids: Sequence[int]) -> bytes:
        """As many last bytes of the prompt as a character can have, or all there are."""
        end = b""
        for token in reversed(prompt_ids):
            end = self._table[token] + end
            if len(end) >= _LONGEST_CHARACTER:
                break
        return end

    def _release(self, text: str) -> str:
        """Moves text past the stop strings: returns what is final and holds the rest back."""
        stoppable = self._unstoppable <= 0
        self._unstoppable -= 1
        if not self._held and self._openers.isdisjoint(text):
            return text  # the usual case: no stop string ends or begins here
        seen, self._held = len(self._held), self._held + text
        if stoppable and (found := self._completed(seen)):
            start, self.stopped_by = found
            end = start + len(self.stopped_by) if self._include_stop else start
            final, self._held = self._held[:end], ""
            return final
        keep = min((self._beginning(stop) for stop in self._stop), default=len(self._held))
        final, self._held = self._held[:keep], self._held[keep:]
        return final

    def _completed(self, seen: int) -> tuple[int, str] | None:
        """Start and name of the first stop string that ends after `seen` characters."""
        found: list[tuple[int, int, str]] = []
        for stop in self._stop:
            start = self._held.find(stop, max(0, seen - len(stop) + 1))
            if start >= 0:
                found.append((start + len(stop), start, stop))
        return min(found)[1:] if found else None

    def _beginning(self, stop: str) -> int:
        """Where the longest suffix that begins `stop` starts; the text's length if none does."""
        held = self._held
        at = max(0, len(held) - len(stop) + 1)
        while (at := held.find(stop[0], at)) >= 0:
            if stop.startswith(held[at:]):
                return at
            at += 1
        return len(held)
