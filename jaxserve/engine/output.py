"""From sampled ids to what the user reads: text, stop conditions, log-probabilities."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np

from jaxserve.engine.sequence import Sequence
from jaxserve.errors import EngineError
from jaxserve.request import CompletionOutput, Logprob, TokenLogprobs

TokenText = Callable[[int], str]


def advance(seq: Sequence, token: int, logprob: TokenLogprobs | None) -> CompletionOutput:
    """Appends a drawn token to a sequence and returns what that adds to its completion.

    Raises:
        EngineError: there is no token, because the model's scores were not finite.
    """
    if token < 0:
        raise not_finite(seq)
    seq.tokens.append(token)
    reason, stop_reason = _ending(seq, token)
    text = ""
    if seq.text is not None:
        hidden = (
            reason == "stop" and token in seq.stop_ids and not seq.params.include_stop_str_in_output
        )
        text = "" if hidden else seq.text.push((token,))
        if seq.text.stopped_by is not None:
            reason, stop_reason = "stop", seq.text.stopped_by
        if reason is not None:
            text += seq.text.flush()
    delta = CompletionOutput(
        seq.index, text, [token], finish_reason=reason, stop_reason=stop_reason
    )
    if logprob is not None:
        seq.cumulative_logprob += logprob[token].logprob
        delta.logprobs, delta.cumulative_logprob = [logprob], seq.cumulative_logprob
    metrics = seq.generation.metrics
    if metrics.first_token_time is None:
        metrics.first_token_time = time.monotonic()
    if reason is not None:
        metrics.finished_time = time.monotonic()
    return delta


def goes_on(seq: Sequence, token: int) -> bool:
    """Appends a token of a path of which nobody reads single tokens; False: `advance` is to.

    The short way for nearly all tokens of searches: they end nothing.
    """
    if (
        seq.rest is None
        or seq.finished
        or token < 0
        or token in seq.stop_ids
        or len(seq.tokens) + 1 >= seq.max_len
    ):
        return False
    seq.tokens.append(token)
    seq.in_flight -= 1
    return True


def not_finite(seq: Sequence) -> EngineError:
    """The error of a sequence for which the model has nothing but NaN or infinity to say."""
    return EngineError(
        f"the model's scores for request {seq.generation.request_id} are NaN or infinite after "
        f"{len(seq.tokens)} tokens; check the weights, or serve with dtype='float32'"
    )


def _ending(seq: Sequence, token: int) -> tuple[Any, int | None]:
    """Why the sequence ends with this token, if it does: finish_reason and stop_reason."""
    p = seq.params
    if seq.matcher is not None and not seq.matcher.accept(token):
        raise EngineError(
            f"token {token} breaks the grammar of request {seq.generation.request_id}"
        )
    if token in seq.stop_ids and seq.num_output > p.min_tokens:
        return "stop", token if token in p.stop_token_ids else None
    if seq.matcher is not None and seq.matcher.finished:
        return "stop", None
    if len(seq.tokens) >= seq.max_len:
        return "length", None
    return None, None


def token_logprobs(
    token: int, found: Seq[np.ndarray], i: int, n: int, text: TokenText
) -> TokenLogprobs:
    """Row i of `sampler.logprobs_of`: the token first, then the n most likely."""
    logprob, rank, top_ids, top = (array[i] for array in found)
    out = {token: Logprob(float(logprob), int(rank), text(token))}
    for place in range(n):
        other = int(top_ids[place])
        out.setdefault(other, Logprob(float(top[place]), place + 1, text(other)))
    return out
