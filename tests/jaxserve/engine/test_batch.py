"""Steps of decoding rows, packed by columns, are what the general way would make of them."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import pytest

from jaxserve.engine.batch import SlotTable, pack_sampling, pack_tokens
from jaxserve.engine.scheduler import Row, Step
from jaxserve.engine.sequence import Sequence
from jaxserve.request import SamplingParams


@dataclass(frozen=True)
class Sizes:
    max_num_seqs: int = 8
    page_size: int = 4
    pages_per_seq: int = 6


def decoding(rng: Random, rows: int, **params: Any) -> tuple[Step, SlotTable]:
    """Rows of one token each, some of which is still on the device."""
    table, step = SlotTable(Sizes(), 50), Step()  # type: ignore[arg-type]
    for slot in rng.sample(range(8), rows):
        tokens = [rng.randrange(50) for _ in range(rng.randint(1, 20))]
        start = len(tokens) - rng.randint(0, 1)
        pages = [rng.randrange(30) for _ in range(6)]
        seq = Sequence(tokens, 1, SamplingParams(**params), None, b"", pages=pages)  # type: ignore[arg-type]
        seq.slot = slot
        step.rows.append(Row(seq, start, 1, True))
        step.num_tokens += 1
    table.enter(step.rows)
    return step, table


def test_those_who_move_in_together_are_written_as_each_alone():
    settings = [
        {"temperature": 0.5, "top_k": 3, "top_p": 0.9},
        {"logit_bias": {7: 1.5, 9: -2.0}, "presence_penalty": 0.5},
        {"min_tokens": 2, "logprobs": 1},
    ]
    rows = list[Row]()
    for slot, params in enumerate(settings):
        seq = Sequence([1, 2], 1 + slot, SamplingParams(**params), None, b"", pages=[slot])  # type: ignore[arg-type]
        seq.slot, seq.seed = 2 * slot, (2**32 - 1 - slot, 2**31 + slot)
        seq.confidence_k, seq.observed = 3 + slot, [] if slot == 1 else None
        rows.append(Row(seq, 1, 1, True))
    together, alone = SlotTable(Sizes(), 50), SlotTable(Sizes(), 50)  # type: ignore[arg-type]
    assert together.enter(rows) == [row.seq for row in rows]
    assert [alone.enter([row]) for row in rows] == [[row.seq] for row in rows]
    assert together.enter(rows) == []
    for name in ("ints", "floats", "flags", "bias_ids", "bias", "tables"):
        np.testing.assert_array_equal(getattr(together, name), getattr(alone, name), name)
    words = together.ints[[0, 2, 4], 4:6].view(np.uint32).tolist()
    assert words == [[2**32 - 1 - slot, 2**31 + slot] for slot in range(3)]
    assert together.floats[0, :2].tolist() == pytest.approx([0.5, 0.9])
    assert together.flags[[0, 2, 4]].tolist() == [
        [False] * 5,
        [True, True, False, False, True],
        [False, False, True, True, False],
    ]


@pytest.mark.parametrize("rows", range(1, 9))
def test_columns_are_what_the_general_way_makes(rows: int):
    rng = Random(rows)
    for _ in range(20):
        step, table = decoding(rng, rows)
        short = pack_tokens(step, 8, 8, table)
        step.groups = []  # where kernels know groups, the general way is taken
        long = pack_tokens(step, 8, 8, table)
        assert short.rows.shape == (3, 9)
        np.testing.assert_array_equal(short.rows, long.rows[:3])
        for name in ("tokens", "tables", "counts"):
            np.testing.assert_array_equal(getattr(short, name), getattr(long, name))
            assert getattr(short, name).dtype == getattr(long, name).dtype
    assert (short.tokens[0] == -1).any() or rows < 3, "some tokens are on the device"


def test_prompts_that_are_scored_take_the_general_way():
    step, table = decoding(Random(0), 2, prompt_logprobs=1)
    for row in step.rows:
        row.seq.prompt_len, row.seq.tokens, row.start = 5, [1, 2, 3, 4, 9], 2
    assert pack_tokens(step, 8, 8, table).tokens[3, :2].tolist() == [4, 4], "targets"


@pytest.mark.parametrize("rows", [1, 5, 8])
def test_padding_asks_for_nothing(rows: int):
    """A feature that no row uses is skipped (`sampler.sample`), so padding must not use one."""
    step, table = decoding(Random(rows), rows, temperature=1.0)
    x = pack_sampling(step, 8, table).unpack()
    assert (x.temperature[rows:] == 0).all() and (x.top_k == 0).all()
    assert (x.top_p == 1).all() and (x.min_p == 0).all() and (x.repetition == 1).all()
    assert not any((x.use_penalties, x.use_bias, x.use_mask, x.use_logprobs, x.use_stats))
