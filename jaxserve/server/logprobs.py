"""Log-probabilities in each API's shape."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from jaxserve.request import TokenLogprobs
from jaxserve.server.openai import (
    CompletionLogprobs,
    PromptLogprobs,
    TokenAlternative,
    TokenLogprob,
)


def completion_logprobs(
    tokenizer: Any,
    token_ids: Sequence[int],
    logprobs: Iterable[TokenLogprobs | None],
    offset: int = 0,
) -> CompletionLogprobs:
    """The shape of `/v1/completions`. `offset` is where the first token starts in the text."""
    out = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for token_id, found in zip(token_ids, logprobs, strict=True):
        text = tokenizer.token_text(token_id)
        out.tokens.append(text)
        out.text_offset.append(offset)
        offset += len(text)
        out.token_logprobs.append(None if found is None else found[token_id].logprob)
        out.top_logprobs.append(None if found is None else _by_text(tokenizer, found))
    return out


def _by_text(tokenizer: Any, found: TokenLogprobs) -> dict[str, float]:
    """By token text. Where two tokens look the same, the likelier one is kept."""
    best: dict[str, float] = {}
    for token_id, entry in found.items():
        text = tokenizer.token_text(token_id)
        best[text] = max(entry.logprob, best.get(text, entry.logprob))
    return best


def chat_logprobs(
    tokenizer: Any, token_ids: Sequence[int], logprobs: Iterable[TokenLogprobs], top: int
) -> list[TokenLogprob]:
    """The shape of `/v1/chat/completions`: the sampled token, and the `top` likeliest."""
    return [
        TokenLogprob(
            **_named(tokenizer, token_id, found[token_id].logprob),
            top_logprobs=[
                TokenAlternative(**_named(tokenizer, other, entry.logprob))
                for other, entry in _likeliest(found, top)
            ],
        )
        for token_id, found in zip(token_ids, logprobs, strict=True)
    ]


def _likeliest(found: TokenLogprobs, top: int):
    return islice(sorted(found.items(), key=lambda kv: -kv[1].logprob), top)


def _named(tokenizer: Any, token_id: int, logprob: float) -> dict[str, Any]:
    raw = tokenizer.token_bytes.table(False)[token_id]  # exact, where text would hold U+FFFD
    return {"token": tokenizer.token_text(token_id), "logprob": logprob, "bytes": list(raw)}


def prompt_logprobs(
    tokenizer: Any, logprobs: Sequence[TokenLogprobs | None] | None
) -> PromptLogprobs | None:
    """vLLM's shape: by token id, the prompt's own token first."""
    if logprobs is None:
        return None
    return [
        None
        if found is None
        else {
            str(token_id): {
                "logprob": entry.logprob,
                "rank": entry.rank,
                "decoded_token": tokenizer.token_text(token_id),
            }
            for token_id, entry in found.items()
        }
        for found in logprobs
    ]
