"""What each token adds to a text, as bytes.

A text is the UTF-8 reading of its tokens' bytes, with U+FFFD for what is not UTF-8. One rule then
serves whole texts, streams and grammars, and a stream cannot disagree with the whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import Any

import tokenizers

_SPACE = "\u2581"  # how sentencepiece spells a space
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    """The character that GPT-2's byte-level vocabularies print for each byte, inverted."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(hidden)}


_ALPHABET = _byte_level_alphabet()


class TokenBytes:
    """Bytes of every token, found on first use and kept.

    Args:
        backend: the `tokenizers` tokenizer; only read.
        special_ids: ids that `skip_special_tokens` leaves out.
    """

    def __init__(self, backend: tokenizers.Tokenizer, special_ids: frozenset[int]):
        kinds = _decoder_kinds(backend)
        self._backend = backend
        self._byte_level = "ByteLevel" in kinds
        self._byte_fallback = "ByteFallback" in kinds
        self._anchor = None if self._byte_level else _find_anchor(backend, special_ids)
        self._all = _Table(self._inside)
        self._visible = _Table(lambda i: b"" if i in special_ids else self._inside(i))
        self.special_ids = special_ids

    def table(self, skip_special_tokens: bool) -> dict[int, bytes]:
        """Bytes by token id, anywhere but at the start of a text; an unknown id adds none."""
        return self._visible if skip_special_tokens else self._all

    def join(self, ids: Iterable[int], skip_special_tokens: bool, at_start: bool = True) -> bytes:
        """Bytes of tokens in a row. At the start of a text Llama's leading space is dropped."""
        ids = list(ids)
        table = self.table(skip_special_tokens)
        first = b""
        if at_start and not self._byte_level:
            shown = next(
                (n for n, i in enumerate(ids) if self.appears(i, skip_special_tokens)), None
            )
            if shown is not None:
                first, ids = self.at_start(ids[shown]), ids[shown + 1 :]
        return first + b"".join(map(table.__getitem__, ids))

    def appears(self, token: int, skip_special_tokens: bool) -> bool:
        """Whether the token is part of the text at all."""
        if skip_special_tokens and token in self.special_ids:
            return False
        return self._token(token) is not None

    def at_start(self, token: int) -> bytes:
        """Bytes of a token that opens a text."""
        alone = self._decode([token])
        if self._byte_level or "\N{REPLACEMENT CHARACTER}" in alone:
            return self._all[token]
        return alone.encode()

    def _inside(self, token: int) -> bytes:
        text = self._token(token)
        if text is None:
            return b""
        if self._byte_level:
            return _byte_level_bytes(text)
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(text)):
            return bytes([int(match[1], 16)])
        if self._anchor is None:
            return self._decode([token]).encode()
        before = self._decode([self._anchor])
        return self._decode([self._anchor, token])[len(before) :].encode()

    def _token(self, token: int) -> str | None:
        try:
            return self._backend.id_to_token(token)
        except OverflowError:  # negative, or wider than 32 bits
            return None

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)


class _Table(dict[int, bytes]):
    """A dictionary that asks `find` once for a missing key: hits cost no Python call."""

    def __init__(self, find: Callable[[int], bytes]):
        super().__init__()
        self._find = find

    def __missing__(self, token: int) -> bytes:
        value = self[token] = self._find(token)
        return value


def _byte_level_bytes(text: str) -> bytes:
    """Bytes behind a byte-level token; an added token outside the alphabet is its own text."""
    try:
        return bytes(map(_ALPHABET.__getitem__, text))
    except KeyError:
        return text.encode()


def _decoder_kinds(backend: tokenizers.Tokenizer) -> set[str]:
    """Names of the decoders in tokenizer.json, without their arguments."""
    decoder: dict[str, Any] = json.loads(backend.to_str())["decoder"] or {}
    return {d["type"] for d in [decoder, *decoder.get("decoders", ())] if "type" in d}


def _find_anchor(backend: tokenizers.Tokenizer, special_ids: frozenset[int]) -> int | None:
    """A plain word to put before a token, so that its text inside a sentence can be read off.

    One without the mark of a space, if there is one: only some decoders drop that at the start.
    """
    marked = None
    for i in range(backend.get_vocab_size(with_added_tokens=True)):
        text = backend.id_to_token(i)
        if text is None or (not text.isascii() and text[:1] != _SPACE) or i in special_ids:
            continue
        if text.isalpha():
            return i
        if marked is None and text[1:].isalnum():
            marked = i
    return marked
