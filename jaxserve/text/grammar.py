"""Structured outputs: which tokens may come next, by llguidance."""

from __future__ import annotations

import functools
import json
import logging
import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import llguidance
import numpy as np
from numpy.typing import NDArray

from jaxserve.errors import RequestError
from jaxserve.request import StructuredOutputs
from jaxserve.text.after_reasoning import AnswerGrammar, MayReason
from jaxserve.text.grammar_rehearsal import Rehearsal
from jaxserve.text.tokenizer import TAGS, Tokenizer

logger = logging.getLogger(__name__)

MAX_GRAMMAR_SIZE = 256 * 1024
"""Most characters of a schema, pattern, grammar or list of choices."""

_PARAM = "structured_outputs"
_COMPLAINT_LENGTH = 400
_LIMITS = llguidance.LLParserLimits(verbose_errors=False)
_rehearsal = Rehearsal()


def compile_grammar(tokenizer: Tokenizer, outputs: StructuredOutputs) -> Grammar | AnswerGrammar:
    """The grammar of these outputs, from a cache if it has been seen lately.

    Takes milliseconds for what people write and a few seconds for what attackers write, so call it
    outside an event loop. `oneOf` in a schema is read as `anyOf`.

    Raises:
        RequestError: the schema, pattern or grammar is wrong, unsatisfiable or too costly.
    """
    vocabulary = _vocabulary(tokenizer)
    source = _source(outputs, vocabulary)
    if len(source) > MAX_GRAMMAR_SIZE:
        raise _fault(f"takes {len(source)} characters; at most {MAX_GRAMMAR_SIZE} are compiled")
    grammar = _compile(vocabulary, source)
    if isinstance(outputs, MayReason):
        return AnswerGrammar(grammar, tokenizer, outputs.inside)
    return grammar


class Grammar:
    """A compiled grammar, shared by all sequences that obey it."""

    def __init__(self, vocabulary: _Vocabulary, start: llguidance.LLMatcher):
        self._vocabulary, self._start = vocabulary, start

    def matcher(self) -> Matcher:
        """A matcher at the beginning of the text. Takes microseconds."""
        return Matcher(self._vocabulary, self._start.deep_copy())


class Matcher:
    """Where one sequence stands in its grammar.

    Attributes:
        finished: nothing but the end may follow; `fill` permits the eos tokens alone.
    """

    def __init__(self, vocabulary: _Vocabulary, state: llguidance.LLMatcher):
        self._vocabulary, self._state = vocabulary, state

    @property
    def finished(self) -> bool:
        return self._state.is_stopped()

    def fill(self, mask: NDArray[Any]) -> None:
        """Sets the bits of the tokens that may come next and clears all others.

        Args:
            mask: [ceil(V / 32)] int32 or uint32, contiguous; V is the model's vocabulary, which may
                be larger than the tokenizer's. Token t is bit `t % 32` of word `t // 32`.
        """
        words = self._vocabulary.words
        mask[:] = 0
        row = mask if len(mask) == words else np.zeros(words, mask.dtype)
        if not self._state.is_stopped():
            self._state.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
            if self._state.is_error():  # it ran out of its budget for one step
                logger.warning("structured output ends early: %s", _complaint(self._state))
            self._spell(row)
        if row is not mask:
            shared = min(words, len(mask))
            mask[:shared] = row[:shared]
        if not mask.any():
            mask |= self._vocabulary.eos_mask(len(mask), mask.dtype)

    def accept(self, token: int) -> bool:
        """Moves on by a token; False, and no move, if it is not permitted here."""
        if not 0 <= token < self._vocabulary.size:
            return False
        if self._state.is_stopped():
            return token in self._vocabulary.eos_token_ids
        return (
            self._state.validate_tokens([token]) == 1
            and self._state.try_consume_tokens([token]) == 1
        )

    def probe(self) -> str:
        """Takes one step, any step; returns what goes wrong, or "". Moves the matcher."""
        mask = np.zeros(self._vocabulary.words, np.uint32)
        self.fill(mask)
        self.accept(_ids_in(mask)[0])
        return _complaint(self._state) if self._state.is_error() else ""

    def fork(self) -> Matcher:
        """An independent matcher that stands at the same place. Takes microseconds."""
        return Matcher(self._vocabulary, self._state.deep_copy())

    def _spell(self, row: NDArray[Any]) -> None:
        """Permits the spelling of a special token's name where that name is all that may follow.

        llguidance permits the token itself there, and nothing else, but would not accept it.
        """
        for token in self._vocabulary.special_in(row):
            if self._state.validate_tokens([token]) == 0:
                first, bits = self._vocabulary.spelling(token), row.view("<u4")
                bits[token // 32] &= ~np.uint32(1 << token % 32)
                bits[first // 32] |= np.uint32(1 << first % 32)


# ---- from what the user wrote to what llguidance reads -------------------------------------


def _source(outputs: StructuredOutputs, vocabulary: _Vocabulary) -> str:
    """The grammar in llguidance's own notation."""
    build = llguidance.LLMatcher
    if outputs.regex:
        return build.grammar_from_regex(outputs.regex)
    if outputs.choice:
        choices: Sequence[Any] = outputs.choice  # it came from outside, whatever its type says
        if not all(isinstance(choice, str) for choice in choices):
            raise _fault(f"choice must hold strings, got {list(choices)!r}")
        return build.grammar_from_lark("start: " + " | ".join(map(json.dumps, outputs.choice)))
    if outputs.grammar:
        return build.grammar_from_lark(_without_missing_tags(outputs.grammar, vocabulary))
    schema = {"type": "object"} if outputs.json_object else outputs.json
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema)
        return build.grammar_from_json_schema(text, overrides={"coerce_one_of": True})
    except (ValueError, TypeError, RecursionError) as error:
        raise _fault(f"json is not a JSON schema: {error}") from error


def _without_missing_tags(lark: str, vocabulary: _Vocabulary) -> str:
    """`lark` without the lines `| … <tag>` of tags that are no special tokens: none can match."""
    missing = tuple(f" {tag}" for tag in TAGS if tag not in vocabulary.special)
    if not missing:
        return lark
    lines = lark.split("\n")
    return "\n".join(x for x in lines if not (x.startswith("|") and x.endswith(missing)))


@functools.lru_cache(maxsize=256)
def _compile(vocabulary: _Vocabulary, source: str) -> Grammar:
    if not _rehearsal.survives(source, vocabulary.size, list(vocabulary.special)):
        limit = f"{_rehearsal.cpu_seconds:g} s"
        raise _fault(f"is too costly: it did not compile within {limit}; simplify it")
    start = llguidance.LLMatcher(vocabulary.tokens, source, log_level=0, limits=_LIMITS)
    if start.is_error():
        raise _fault(f"cannot be compiled: {_complaint(start)}")
    grammar = Grammar(vocabulary, start)
    if complaint := grammar.matcher().probe():  # some faults only show when a token is due
        raise _fault(f"cannot be satisfied: {complaint}")
    return grammar


def _fault(message: str) -> RequestError:
    return RequestError(f"structured_outputs {message}", _PARAM)


def _complaint(matcher: llguidance.LLMatcher) -> str:
    """What llguidance says is wrong, without all of the grammar that it quotes."""
    error = matcher.get_error().replace("<non-verbose/>", "").strip()
    if error in ("NoExtension", "NoExtensionBias"):
        return "no token of the vocabulary can come next"
    return error if len(error) <= _COMPLAINT_LENGTH else error[:_COMPLAINT_LENGTH] + "…"


# ---- the tokenizer as llguidance sees it ----------------------------------------------------


class _Vocabulary:
    """One tokenizer's tokens, prepared once."""

    def __init__(self, tokenizer: Tokenizer):
        self.size = tokenizer.vocab_size
        self.words = -(-self.size // 32)
        self.eos_token_ids = tuple(sorted(i for i in tokenizer.eos_token_ids if i < self.size))
        if not self.eos_token_ids:
            raise _fault("needs a tokenizer with an eos token, and this one has none")
        self.tokens = self._tokens(tokenizer)
        added = tokenizer.backend.get_added_tokens_decoder()
        self.special = {t.content: i for i, t in added.items() if self.tokens.is_special_token(i)}
        self._special_mask = _mask_of(self.special.values(), self.words)

    def special_in(self, row: NDArray[Any]) -> list[int]:
        """The special tokens that a mask of `words` words permits."""
        found = row.view("<u4") & self._special_mask
        return _ids_in(found) if found.any() else []

    def spelling(self, token: int) -> int:
        """The token that begins to spell this special one."""
        name = next(name for name, i in self.special.items() if i == token)
        return self.tokens.greedy_tokenize(name[0])[0]

    def eos_mask(self, words: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        """The mask that permits nothing but the end."""
        return _mask_of((i for i in self.eos_token_ids if i < 32 * words), words).astype(dtype)

    def _tokens(self, tokenizer: Tokenizer) -> llguidance.LLTokenizer:
        eos = list(self.eos_token_ids)
        try:
            tokens = llguidance.LLTokenizer(tokenizer.backend.to_str(), eos_token=eos)
            if -(-tokens.vocab_size // 32) == self.words:
                return tokens
        except ValueError:
            pass  # neither byte-level nor byte-fallback: llguidance does not know its decoder
        wrapped = llguidance.TokenizerWrapper(_Wrapped(tokenizer, eos[0]))
        return llguidance.LLTokenizer(wrapped, eos_token=eos)


def _mask_of(ids: Iterable[int], words: int) -> NDArray[np.uint32]:
    bits = np.zeros(32 * words, np.uint8)
    bits[list(ids)] = 1
    return np.packbits(bits, bitorder="little").view("<u4")


def _ids_in(mask: NDArray[Any]) -> list[int]:
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


class _Wrapped:
    """Any other tokenizer: its tokens' bytes, and the longest token first to spell a text."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, eos_token_id: int):
        table = tokenizer.token_bytes.table(skip_special_tokens=False)
        self.eos_token_id = eos_token_id
        self.tokens: Sequence[bytes] = [table[i] for i in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_ids)
        ordinary = set(range(tokenizer.vocab_size)) - tokenizer.special_ids
        self._ids = {self.tokens[i]: i for i in sorted(ordinary, reverse=True) if self.tokens[i]}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: bytes | str) -> list[int]:
        rest = text.encode() if isinstance(text, str) else text
        ids: list[int] = []
        while rest:
            fits = (n for n in range(min(self._longest, len(rest)), 0, -1) if rest[:n] in self._ids)
            if (n := next(fits, None)) is None:
                break
            ids.append(self._ids[rest[:n]])
            rest = rest[n:]
        return ids


_vocabularies: weakref.WeakKeyDictionary[Tokenizer, _Vocabulary] = weakref.WeakKeyDictionary()
_building = threading.Lock()


def _vocabulary(tokenizer: Tokenizer) -> _Vocabulary:
    with _building:  # it takes about a second for a large vocabulary: do it once
        if (found := _vocabularies.get(tokenizer)) is None:
            found = _vocabularies[tokenizer] = _Vocabulary(tokenizer)
        return found
