"""Packs a step into the few arrays that its program takes: ragged tokens, padded to a bucket.

Arrays are fresh for every step: on CPU a running program may still read the ones it was given.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from jaxserve.engine.sampler import MAX_BIAS, SampleInputs
from jaxserve.engine.scheduler import Row, Step
from jaxserve.engine.sequence import Sequence
from jaxserve.errors import RequestError
from jaxserve.plan import Plan
from kernels_pallas.paged_attention import Ragged

MAX_STOPS = 8
"""Stop tokens of one sequence that a decode loop looks at; the host looks at all."""


class StepInputs(NamedTuple):
    """Arrays of one step; T tokens of R sequences."""

    tokens: Any  # int32 [1, T]; -1: drawn by the step before, to be had from `history`
    positions: Any  # int32 [1, T]
    slots: Any  # int32 [T], each token's row of `history`
    last: Any  # int32 [R], each sequence's last token in the step
    targets: Any  # int32 [T], the token after, whose log-probability is asked for
    num_scored: Any  # int32 [], how many tokens of the step to score: all or none
    ragged: Ragged


class SlotTable:
    """Per-sequence settings and page tables, one row per slot, kept up as sequences come and go."""

    def __init__(self, plan: Plan, vocab: int):
        S, self.vocab = plan.max_num_seqs, vocab
        self._page_size = plan.page_size
        self._owner: list[tuple[Sequence, int] | None] = [None] * S
        self.tables = np.zeros((S, plan.pages_per_seq), np.int32)
        self.ints = np.zeros((S, 2), np.int32)  # prompt_len, top_k
        self.floats = np.zeros((S, 6), np.float32)
        self.seeds = np.zeros((S, 2), np.uint32)
        self.bias_ids = np.full((S, MAX_BIAS), vocab, np.int32)
        self.bias = np.zeros((S, MAX_BIAS), np.float32)
        self.flags = np.zeros((S, 2), bool)  # penalties, bias

    def enter(self, row: Row) -> bool:
        """Brings the row's slot up to date; True if the sequence has just moved in."""
        seq = row.seq
        first = row.start // self._page_size
        moved_in = self._owner[seq.slot] != (seq, seq.stay)
        if moved_in:
            self._owner[seq.slot] = (seq, seq.stay)
            self._settings(seq)
            first = 0
        self.tables[seq.slot, first : len(seq.pages)] = seq.pages[first:]
        return moved_in

    def _settings(self, seq: Sequence) -> None:
        p, i = seq.params, seq.slot
        self.ints[i] = seq.prompt_len, p.top_k
        self.floats[i] = (
            p.temperature, p.top_p, p.min_p,
            p.repetition_penalty, p.presence_penalty, p.frequency_penalty,
        )  # fmt: skip
        self.seeds[i] = seq.seed
        self.bias_ids[i] = self.vocab
        for j, (token, value) in enumerate(p.logit_bias.items()):
            self.bias_ids[i, j], self.bias[i, j] = token, value
        self.flags[i] = needs_history(seq), bool(p.logit_bias)


def needs_history(seq: Sequence) -> bool:
    """Whether sampling looks at the tokens so far."""
    p = seq.params
    return p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0


def pack_tokens(step: Step, T: int, R: int, table: SlotTable) -> StepInputs:
    """Arrays for the forward pass of a step whose rows have all been entered in `table`."""
    tokens, positions, targets = (np.zeros(T, np.int32) for _ in range(3))
    slots = np.zeros(T, np.int32)
    starts = np.zeros(R + 1, np.int32)
    kv_lens, last = np.zeros(R, np.int32), np.zeros(R, np.int32)
    tables = np.zeros((R, table.tables.shape[1]), np.int32)
    at = scored = 0
    for r, row in enumerate(step.rows):
        seq, start, count = row.seq, row.start, row.count
        end = at + count
        if count == 1:
            tokens[at] = seq.tokens[start] if start < len(seq.tokens) else -1
            positions[at], slots[at] = start, seq.slot
        else:
            tokens[at:end] = seq.tokens[start : start + count]
            positions[at:end] = np.arange(start, start + count)
            slots[at:end] = seq.slot
        if seq.params.prompt_logprobs is not None and start < seq.prompt_len - 1:
            following = seq.tokens[start + 1 : start + count + 1]
            targets[at : at + len(following)] = following
            scored = step.num_tokens
        starts[r + 1], kv_lens[r], last[r] = end, start + count, end - 1
        at = end
    n = len(step.rows)
    starts[n + 1 :] = at
    tables[:n] = table.tables[[row.seq.slot for row in step.rows]]
    ragged = Ragged(starts, kv_lens, tables, np.int32(n))
    return StepInputs(tokens[None], positions[None], slots, last, targets, np.int32(scored), ragged)


def pack_sampling(step: Step, R: int, table: SlotTable, unused: dict[str, Any]) -> SampleInputs:
    """Arrays for drawing the next token of each row of a step.

    Args:
        unused: what to pass for `bias_ids`, `bias` and `mask` where no row needs them; on the
            device already, so that a step does not upload zeros.
    """
    rows, n = step.rows, len(step.rows)
    index = [row.seq.slot for row in rows]
    drawing = np.fromiter((row.samples for row in rows), bool, n)
    slots = np.full(R, table.tables.shape[0], np.int32)  # out of range: nothing is recorded
    slots[:n] = np.where(drawing, index, slots[:n])
    ints, floats = np.zeros((R, 2), np.int32), np.zeros((R, 6), np.float32)
    ints[:n], floats[:n] = table.ints[index], table.floats[index]
    floats[:n, 0] *= drawing
    floats[n:, 3] = 1.0
    seeds, lengths = np.zeros((R, 2), np.uint32), np.zeros(R, np.int32)
    seeds[:n] = table.seeds[index]
    lengths[:n] = [row.start + row.count for row in rows]
    penalties, bias = bool(table.flags[index, 0].any()), bool(table.flags[index, 1].any())
    masked = [r for r, row in enumerate(rows) if row.samples and _is_masked(row)]
    arrays = dict(unused)
    if bias:
        arrays["bias_ids"], arrays["bias"] = (
            _rows(table.bias_ids, index, R),
            _rows(table.bias, index, R),
        )
    if masked:
        arrays["mask"] = _masks(rows, masked, R, table.vocab)
    return SampleInputs(
        slots, lengths, ints[:, 0], ints[:, 1], seeds, *(floats[:, i] for i in range(6)),
        **arrays,
        use_penalties=np.bool_(penalties),
        use_bias=np.bool_(bias),
        use_mask=np.bool_(bool(masked)),
        use_logprobs=np.bool_(any(row.seq.params.logprobs is not None for row in rows)),
    )  # fmt: skip


def pack_stops(step: Step, R: int) -> np.ndarray:
    """Stop tokens [R, MAX_STOPS] of a step's sequences; -1 where there is none."""
    stops = np.full((R, MAX_STOPS), -1, np.int32)
    for r, row in enumerate(step.rows):
        ids = sorted(row.seq.stop_ids)[:MAX_STOPS]
        stops[r, : len(ids)] = ids
    return stops


def _rows(table: np.ndarray, index: list[int], R: int) -> np.ndarray:
    out = np.zeros((R, table.shape[1]), table.dtype)
    out[: len(index)] = table[index]
    return out


def _is_masked(row: Row) -> bool:
    return row.seq.matcher is not None or _below_minimum(row)


def _below_minimum(row: Row) -> bool:
    """Whether the token to draw may not end the text yet."""
    return row.start + row.count - row.seq.prompt_len < row.seq.params.min_tokens


def _masks(rows: list[Row], masked: list[int], R: int, vocab: int) -> np.ndarray:
    """Bit masks of permitted tokens, by grammar and by `min_tokens`."""
    out = np.full((R, -(-vocab // 32)), 0xFFFFFFFF, np.uint32)
    for r in masked:
        seq = rows[r].seq
        if seq.matcher is not None:
            seq.matcher.fill(out[r])
        if _below_minimum(rows[r]):
            for token in seq.stop_ids:
                out[r, token // 32] &= ~np.uint32(1 << token % 32)
    return out


def check_sampling(params: Any, vocab: int) -> None:
    """Raises RequestError for what the arrays above cannot carry."""
    if len(params.logit_bias) > MAX_BIAS:
        raise RequestError(
            f"logit_bias has {len(params.logit_bias)} entries; at most {MAX_BIAS}", "logit_bias"
        )
    for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
        if bad := [i for i in ids if not 0 <= i < vocab]:
            raise RequestError(f"{name} names token {bad[0]}; the vocabulary has {vocab}", name)
