"""Packing: every document whole, in order, once; and streams that can be entered anywhere."""

import json
import time
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.cli import quantize
from jaxserve.errors import ConfigError
from jaxserve.testing import write_checkpoint
from jaxserve.train import sources
from jaxserve.train.data import Document, Packed, ahead, pack
from jaxserve.train.sources import Lines, Pairs


@dataclass(frozen=True)
class Numbered:
    """Document i has `lengths[i]` tokens, all of them i + 1; the first half is a prompt."""

    lengths: tuple[int, ...]

    def document(self, index):
        n = self.lengths[index % len(self.lengths)]
        return Document([index + 1] * n, [0.0] * (n // 2) + [1.0] * (n - n // 2))


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=12),
    rows=st.integers(1, 4),
    length=st.integers(2, 24),
)
@settings(max_examples=100, deadline=None)
def test_documents_are_whole_and_in_the_order_of_the_stream(lengths, rows, length):
    source, cursor = Numbered(tuple(lengths)), 0
    for _ in range(3):
        batch, after = pack(source, cursor, rows, length)
        assert after > cursor
        for i in range(cursor, after):
            tokens, weights = source.document(i)
            row, at = (x[0] for x in np.where(batch.tokens == i + 1))
            n = min(len(tokens), length)
            place = (row, slice(at, at + n))
            assert (batch.tokens == i + 1).sum() == n
            assert len(set(batch.segments[place].tolist())) == 1
            assert batch.positions[place].tolist() == list(range(n))
            assert batch.targets[row, at : at + n - 1].tolist() == tokens[1:n]
            assert batch.weights[place].tolist() == [*weights[1:n], 0.0]
        assert batch.num_tokens == sum(min(len(source.document(i)[0]), length)
                                       for i in range(cursor, after))  # fmt: skip
        assert not batch.weights[batch.segments == 0].any()
        cursor = after


def test_a_thread_makes_the_same_batches_and_ends():
    source = Numbered((3, 5, 7))
    stream = ahead(lambda at: Packed(*pack(source, at, 2, 8)), 4)
    got = [next(stream) for _ in range(3)]
    stream.close()
    at = 4
    for packed in got:
        batch, at = pack(source, at, 2, 8)
        np.testing.assert_array_equal(batch.tokens, packed.batch.tokens)
        assert at == packed.cursor


def test_what_the_thread_meets_is_raised_by_the_reader():
    def fails(at):
        time.sleep(0.01)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        next(ahead(fails, 0))


def encode(text):
    return [1, *(len(word) + 1 for word in text.split())]


def test_prompts_are_not_learnt_and_texts_are():
    pairs = Pairs(lambda i: ("a bb", "ccc") if i else ("", "a bb"), encode, 0)
    assert pairs.document(1) == Document([1, 2, 3, 4, 0], [0.0, 0.0, 0.0, 1.0, 1.0])
    assert pairs.document(0) == Document([1, 2, 3, 0], [1.0] * 4)


def test_lines_come_in_an_order_of_their_own_in_each_epoch(tmp_path):
    file = tmp_path / "a.jsonl"
    lines = [{"text": "x" * n} for n in range(1, 9)] + [{"prompt": "p", "completion": "cc"}]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    source = Lines((file,), 0, encode, 0)
    epochs = [[tuple(source.document(9 * e + i).tokens) for i in range(9)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]
    again = Lines((file,), 0, encode, 0)
    assert [tuple(again.document(i).tokens) for i in range(9)] == epochs[0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"text": "a"}\n{"text": "b', r"a\.jsonl:2 is not JSON.*truncated"),
        ('{"prompt": "a"}\n', r'a\.jsonl:1 must have "text"'),
        ("[1]\n", r'a\.jsonl:1 must have "text"'),
        ("", r"a\.jsonl: no lines"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path, text, says):
    file = tmp_path / "a.jsonl"
    file.write_text(text)
    with pytest.raises(ConfigError, match=says):
        Lines((file,), 0, encode, 0).document(0)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*b\.jsonl"):
        Lines((tmp_path / "b.jsonl",), 0, encode, 0).document(0)


def test_a_line_ends_with_a_newline_and_with_nothing_else(tmp_path):
    """JSON strings may have other ends of lines in them as they are."""
    file, text = tmp_path / "text.jsonl", "one\u2028two\x85three\x7ffour"
    lines = [json.dumps({"text": text}, ensure_ascii=False)] * 2
    file.write_bytes("\r\n".join([*lines, ""]).encode())
    assert sources._read(file) == [("", text)] * 2
    source = write_checkpoint(tmp_path / "model", "llama")
    assert len(quantize.read(source, file)) == 2
