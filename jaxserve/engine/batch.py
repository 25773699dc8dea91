"""Packs a step into the few arrays that its program takes: ragged tokens, padded to a bucket.

Arrays are fresh for every step: on CPU a running program may still read the ones it was given.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxserve.engine.sampler import MAX_BIAS, SampleInputs
from jaxserve.engine.scheduler import Row, Step
from jaxserve.engine.sequence import Sequence
from jaxserve.errors import RequestError
from jaxserve.plan import Plan
from kernels_pallas.paged_attention import Groups, Ragged

MAX_STOPS = 8
"""Stop tokens of one sequence that a decode loop looks at; the host looks at all."""


class StepInputs(NamedTuple):
    """What a forward pass reads of its step: T tokens of R sequences."""

    tokens: Any  # int32 [1, T]; -1: drawn by the step before, to be had from `history`
    positions: Any  # int32 [1, T]
    slots: Any  # int32 [T], each token's row of `history`
    targets: Any  # int32 [T], the token after, whose log-probability is asked for
    last: Any  # int32 [R], each sequence's last token in the step
    num_scored: Any  # int32 [], how many tokens of the step to score: all or none
    ragged: Ragged


class StepArrays(NamedTuple):
    """`StepInputs` as it travels: an array costs the host microseconds, whatever its size."""

    tokens: Any  # int32 [4, T]: tokens, positions, slots, targets
    rows: Any  # int32 [3, R + 1]: row_starts; kv_lens and last, with an unused column; or
    # [6, R + 1], with firsts, ends and pages of up to R // 2 groups
    tables: Any  # int32 [R, M]
    counts: Any  # int32 [2]: num_seqs, num_scored

    def unpack(self) -> StepInputs:
        tokens, positions, slots, targets = self.tokens
        (starts, lens, last), groups = self.rows[:3], self.rows[3:]
        most = len(self.tables) // 2  # two rows make a group
        shared = Groups(*groups[:, :most]) if most and len(groups) else None
        ragged = Ragged(starts, lens[:-1], self.tables, self.counts[0], shared)
        return StepInputs(
            tokens[None], positions[None], slots, targets, last[:-1], self.counts[1], ragged
        )


class SampleArrays(NamedTuple):
    """`SampleInputs` as it travels."""

    ints: Any  # int32 [R, 7]: slot, length, prompt_len, top_k, the seed's two words, confidence_k
    floats: Any  # float32 [R, 6]: in the order of `SampleInputs`
    flags: Any  # bool [5]: likewise
    bias_ids: Any
    bias: Any
    mask: Any

    def unpack(self) -> SampleInputs:
        slots, lengths, prompt_lens, top_k = self.ints.T[:4]
        seeds = lax.bitcast_convert_type(self.ints[:, 4:6], jnp.uint32)
        extras = (self.bias_ids, self.bias, self.mask, *self.flags, self.ints[:, 6])
        fields = (slots, lengths, prompt_lens, top_k, seeds, *self.floats.T, *extras)
        return SampleInputs._make(fields)


class NoiseArrays(NamedTuple):
    """How each row [R] of a step is refined; as `RouteNoise`."""

    K: Any  # int32; 1: it is not
    spared: Any  # int32
    tau: Any  # float32
    reuse: Any  # float32
    mix: Any  # float32
    gate: Any  # float32


class SlotTable:
    """Per-sequence settings and page tables, one row per slot, kept up as sequences come and go."""

    def __init__(self, plan: Plan, vocab: int):
        S, self.vocab = plan.max_num_seqs, vocab
        self._page_size = plan.page_size
        self._owner: list[Sequence | None] = [None] * S
        self._stay = [0] * S  # of the owner
        self._entered = [0] * S  # pages of it in `tables`
        self.tables = np.zeros((S, plan.pages_per_seq), np.int32)
        self.ints = np.zeros((S, 7), np.int32)
        self.floats = np.zeros((S, 6), np.float32)
        self.bias_ids = np.full((S, MAX_BIAS), vocab, np.int32)
        self.bias = np.zeros((S, MAX_BIAS), np.float32)
        self.flags = np.zeros((S, 5), bool)  # penalties, bias, mask, logprobs, stats

    def enter(self, rows: list[Row]) -> list[Sequence]:
        """Brings the slots of a step's rows up to date; the sequences that have just moved in."""
        moved_in = [row.seq for row in rows if self._enter(row)]
        if moved_in:
            self._settings(moved_in)
        return moved_in

    def _enter(self, row: Row) -> bool:
        """Brings a row's page table up to date; whether its sequence has just moved in."""
        seq, slot, pages = row.seq, row.seq.slot, row.seq.pages
        first = row.start // self._page_size
        moved_in = self._owner[slot] is not seq or self._stay[slot] != seq.stay
        if moved_in:
            self._owner[slot], self._stay[slot], first = seq, seq.stay, 0
        elif self._entered[slot] == len(pages) and self.tables[slot, first] == pages[first]:
            return False  # neither grown nor copied on write
        self.tables[slot, first : len(pages)] = pages[first:]
        self._entered[slot] = len(pages)
        return moved_in

    def _settings(self, seqs: list[Sequence]) -> None:
        """Writes those of sequences that move in: all at once, since each write into an array costs
        a microsecond, and a search may begin a step with all its paths."""
        slots = [seq.slot for seq in seqs]
        ints = [(s.slot, 0, s.prompt_len, s.params.top_k, *s.seed, s.confidence_k) for s in seqs]
        self.ints[slots] = np.array(ints, np.int64).astype(np.int32)  # words of seeds wrap around
        self.floats[slots] = [
            (
                p.temperature, p.top_p, p.min_p,
                p.repetition_penalty, p.presence_penalty, p.frequency_penalty,
            )
            for p in (seq.params for seq in seqs)
        ]  # fmt: skip
        self.flags[slots] = [_flags(seq) for seq in seqs]
        self.bias_ids[slots] = self.vocab
        for seq in seqs:
            for j, (token, value) in enumerate(seq.params.logit_bias.items()):
                self.bias_ids[seq.slot, j], self.bias[seq.slot, j] = token, value


def _flags(seq: Sequence) -> tuple[bool, ...]:
    """As `SlotTable.flags`."""
    p = seq.params
    masked = seq.matcher is not None or p.min_tokens > 0
    reported, observed = p.logprobs is not None, seq.observed is not None
    return needs_history(seq), bool(p.logit_bias), masked, reported, observed


def needs_history(seq: Sequence) -> bool:
    """Whether sampling looks at the tokens so far."""
    p = seq.params
    return p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0


def pack_tokens(step: Step, T: int, R: int, table: SlotTable) -> StepArrays:
    """Arrays for the forward pass of a step whose rows have all been entered in `table`."""
    decodes = step.num_tokens == len(step.rows)
    if decodes and all(row.seq.params.prompt_logprobs is None for row in step.rows):
        return _pack_decoding(step, T, R, table)
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    ends: list[int] = []
    lens: list[int] = []
    targets, scored = np.zeros(T, np.int32), 0
    for row in step.rows:
        seq, start, count = row.seq, row.start, row.count
        stop = start + count
        if seq.params.prompt_logprobs is not None and start < seq.prompt_len - 1:
            following = seq.tokens[start + 1 : stop + 1]
            targets[len(ids) : len(ids) + len(following)] = following
            scored = step.num_tokens
        if count == 1:
            ids.append(seq.tokens[start] if start < len(seq.tokens) else -1)
            positions.append(start)
            slots.append(seq.slot)
        else:
            ids += seq.tokens[start:stop]
            positions += range(start, stop)
            slots += (seq.slot,) * count
        ends.append(len(ids))
        lens.append(stop)
    n = len(ends)
    tokens, rows = np.zeros((4, T), np.int32), _edges(step, R)
    tokens[:3, : len(ids)] = ids, positions, slots
    tokens[3] = targets
    rows[0, 1 : n + 1], rows[0, n + 1 :] = ends, len(ids)
    rows[1, :n], rows[2, :n] = lens, rows[0, 1 : n + 1] - 1
    tables = np.zeros((R, table.tables.shape[1]), np.int32)
    tables[:n] = table.tables[[row.seq.slot for row in step.rows]]
    return StepArrays(tokens, rows, tables, np.array((n, scored), np.int32))


def _edges(step: Step, R: int) -> np.ndarray:
    """`StepArrays.rows` with nothing but groups, and room for them only where kernels know any."""
    edges = np.zeros((3 if step.groups is None else 6, R + 1), np.int32)
    if step.groups:
        edges[3:, : len(step.groups)] = np.array(step.groups).T
    return edges


def _pack_decoding(step: Step, T: int, R: int, table: SlotTable) -> StepArrays:
    """`pack_tokens` of rows of one token each, which most steps are made of."""
    rows = step.rows
    n, slots = len(rows), [row.seq.slot for row in rows]
    tokens, edges = np.zeros((4, T), np.int32), _edges(step, R)
    starts = [row.start for row in rows]
    known = [row.seq.tokens for row in rows]
    tokens[0, :n] = [t[i] if i < len(t) else -1 for t, i in zip(known, starts, strict=True)]
    tokens[1, :n], tokens[2, :n] = starts, slots
    edges[0, : n + 1], edges[0, n + 1 :] = np.arange(n + 1), n
    edges[1, :n], edges[2, :n] = tokens[1, :n] + 1, edges[0, :n]
    tables = np.zeros((R, table.tables.shape[1]), np.int32)
    tables[:n] = table.tables[slots]
    return StepArrays(tokens, edges, tables, np.array((n, 0), np.int32))


def pack_sampling(step: Step, R: int, table: SlotTable) -> SampleArrays:
    """Arrays for drawing the next token of each row of a step.

    `bias_ids`, `bias` and `mask` are None where no row needs them.
    """
    rows, n = step.rows, len(step.rows)
    index = [row.seq.slot for row in rows]
    ints, floats = np.zeros((R, 7), np.int32), np.zeros((R, 6), np.float32)
    ints[:n], floats[:n] = table.ints[index], table.floats[index]
    ints[:n, 1] = [row.start + row.count for row in rows]
    ints[n:, 0] = table.tables.shape[0]  # out of range: nothing is recorded
    floats[n:, 1] = floats[n:, 3] = 1.0  # else top-p is looked for, of nothing, in all rows
    ints[n:, 6] = 1
    if not all(drawing := [row.samples for row in rows]):
        idle = np.flatnonzero(~np.array(drawing))
        ints[idle, 0], floats[idle, 0] = table.tables.shape[0], 0.0
    flags = np.any(table.flags[index], axis=0)
    bias_ids = _rows(table.bias_ids, index, R) if flags[1] else None
    bias = _rows(table.bias, index, R) if flags[1] else None
    mask = _masks(rows, R, table.vocab) if flags[2] else None
    return SampleArrays(ints, floats, flags, bias_ids, bias, mask)


def pack_noise(step: Step, R: int) -> NoiseArrays:
    """Arrays for refining the tokens that a step draws."""
    ints, floats = np.ones((2, R), np.int32), np.ones((4, R), np.float32)
    for r, row in enumerate(step.rows):
        if (noise := row.seq.route) is not None and row.samples:
            ints[:, r] = noise.K, noise.spared
            floats[:, r] = noise.tau, noise.reuse, noise.mix, noise.entropy_gate
    return NoiseArrays(*ints, *floats)


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


def _below_minimum(row: Row) -> bool:
    """Whether the token to draw may not end the text yet."""
    return row.start + row.count - row.seq.prompt_len < row.seq.params.min_tokens


def _masks(rows: list[Row], R: int, vocab: int) -> np.ndarray:
    """Bit masks of permitted tokens, by grammar and by `min_tokens`."""
    out = np.full((R, -(-vocab // 32)), 0xFFFFFFFF, np.uint32)
    for r, row in enumerate(rows):
        seq = row.seq
        if seq.matcher is not None and row.samples:
            seq.matcher.fill(out[r])
        if _below_minimum(row):
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
