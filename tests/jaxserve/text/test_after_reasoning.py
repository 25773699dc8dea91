"""A grammar of an answer begins where the reasoning ends, and nowhere before."""

import numpy as np
import pytest

from jaxserve.request import SamplingParams, StructuredOutputs
from jaxserve.text.after_reasoning import constrain_answer
from jaxserve.text.grammar import compile_grammar
from jaxserve.text.parsers import make_parser
from jaxserve.text.tokenizer import Tokenizer

from .conftest import BUILDERS
from .test_grammar import BYTE_LEVEL, TOKENIZERS, permitted

DIGITS = StructuredOutputs(regex="[0-9]{2}")
INSIDE, CLOSED, OPEN = "ask\n<think>\n", "ask\n<think>\n\n</think>\n\n", "ask\n"
THINK, UNTHINK = map(BYTE_LEVEL.backend.token_to_id, ("<think>", "</think>"))
WORD = BYTE_LEVEL.encode("fox")[0]
EVERYTHING = set(range(32 * -(-BYTE_LEVEL.vocab_size // 32)))


def matcher(prompt, tokenizer=BYTE_LEVEL, outputs=DIGITS):
    return compile_grammar(tokenizer, constrain_answer(outputs, prompt)).matcher()


def digits(tokenizer=BYTE_LEVEL):
    """What the grammar permits at its beginning."""
    return permitted(matcher(CLOSED, tokenizer), tokenizer.vocab_size)


def accepts(m, ids):
    return all(m.accept(i) for i in ids)


def test_a_closed_prompt_constrains_the_first_token():
    assert constrain_answer(DIGITS, CLOSED) is DIGITS
    assert not {THINK, UNTHINK, WORD} & digits()
    assert BYTE_LEVEL.encode("7")[0] in digits()


@pytest.mark.parametrize("prompt", [INSIDE, INSIDE.rstrip()])
def test_reasoning_is_free_and_the_answer_is_not(prompt):
    m = matcher(prompt)
    for token in (WORD, THINK, *BYTE_LEVEL.encode('{"a": 1} </thin <'), WORD):
        assert permitted(m, BYTE_LEVEL.vocab_size) == EVERYTHING
        assert m.accept(token)
        assert not m.finished
    assert m.accept(UNTHINK)
    assert permitted(m, BYTE_LEVEL.vocab_size) == digits()
    assert not m.accept(WORD)
    assert accepts(m, BYTE_LEVEL.encode("42"))
    assert m.finished
    assert permitted(m, BYTE_LEVEL.vocab_size) == BYTE_LEVEL.eos_token_ids


def test_where_the_prompt_says_nothing_the_first_token_decides():
    m = matcher(OPEN)
    assert permitted(m, BYTE_LEVEL.vocab_size) == digits() | {THINK}
    answer, thought = m.fork(), m.fork()
    assert not m.accept(WORD)
    assert accepts(answer, BYTE_LEVEL.encode("42"))
    assert answer.finished
    assert accepts(thought, [THINK, WORD])
    assert permitted(thought, BYTE_LEVEL.vocab_size) == EVERYTHING
    assert accepts(thought, [UNTHINK, *BYTE_LEVEL.encode("42")])
    assert thought.finished
    late = matcher(OPEN)
    assert accepts(late, BYTE_LEVEL.encode("4"))
    assert not late.accept(THINK)


def test_no_prompt_text_is_an_open_prompt():
    assert permitted(matcher(None), BYTE_LEVEL.vocab_size) == digits() | {THINK}


def test_the_end_may_come_within_the_reasoning():
    m = matcher(INSIDE)
    assert m.accept(WORD)
    assert m.accept(min(BYTE_LEVEL.eos_token_ids))


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
def test_the_end_of_reasoning_may_be_spelled(kind):
    tokenizer = TOKENIZERS[kind]
    m = matcher(INSIDE, tokenizer)
    pieces = "hm</think>" if kind == "byte_level" else ["hm</think>"]  # that one has a token for it
    spelled = [tokenizer.encode(piece, add_special_tokens=False) for piece in pieces]
    assert len(spelled) > 1 or len(spelled[0]) > 5
    assert accepts(m, [i for ids in spelled for i in ids])
    assert permitted(m, tokenizer.vocab_size) == digits(tokenizer)


def test_without_a_token_that_opens_it_there_is_no_reasoning_to_open():
    tokenizer = TOKENIZERS["gemma"]
    assert permitted(matcher(OPEN, tokenizer), tokenizer.vocab_size) == digits(tokenizer)


@pytest.mark.parametrize(("last", "accepted"), [(">\n\n", True), (">7", False), ("k>x", False)])
def test_a_token_may_end_the_reasoning_but_not_begin_the_answer(last, accepted):
    backend = BUILDERS["byte_level"]()
    backend.add_tokens([last])
    tokenizer = Tokenizer(backend, eos_token_ids=[backend.token_to_id("<|end|>")])
    m = matcher(INSIDE, tokenizer)
    head = "</think>"[: -len(last.rstrip("\n7x"))]
    assert accepts(m, [i for c in head for i in tokenizer.encode(c)])
    assert m.accept(backend.token_to_id(last)) == accepted
    if accepted:
        assert permitted(m, tokenizer.vocab_size) == digits(tokenizer)


@pytest.mark.parametrize("dtype", [np.int32, np.uint32])
@pytest.mark.parametrize("prompt", [INSIDE, OPEN])
def test_masks_of_other_sizes(dtype, prompt):
    for words in (1, len(EVERYTHING) // 32, 40):
        found = permitted(matcher(prompt), 32 * words, dtype)
        expected = set(range(32 * words)) if prompt == INSIDE else digits() | {THINK}
        assert found == {i for i in expected if i < 32 * words}


def test_a_fork_within_the_mark_goes_its_own_way():
    m = matcher(INSIDE)
    assert accepts(m, [i for c in "</thin" for i in BYTE_LEVEL.encode(c)])
    fork = m.fork()
    assert accepts(fork, [i for c in "k>" for i in BYTE_LEVEL.encode(c)])
    assert permitted(fork, BYTE_LEVEL.vocab_size) == digits()
    assert permitted(m, BYTE_LEVEL.vocab_size) == EVERYTHING


@pytest.mark.parametrize("name", ["qwen3", "deepseek_r1"])
@pytest.mark.parametrize("prompt", [INSIDE, OPEN, CLOSED])
def test_the_parser_finds_the_answer_where_the_grammar_began(name, prompt):
    """Random permitted walks: what the parser calls content is what the grammar describes."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        m, ids = matcher(prompt), []
        while not m.finished:
            allowed = permitted(m, BYTE_LEVEL.vocab_size) & set(range(BYTE_LEVEL.vocab_size))
            known = allowed & {THINK, UNTHINK} if rng.random() < 0.3 else allowed
            ids.append(int(rng.choice(sorted((known or allowed) - BYTE_LEVEL.eos_token_ids))))
            assert m.accept(ids[-1])
        parser = make_parser(None, name, prompt)
        events = [*parser.push(BYTE_LEVEL.decode(ids, skip_special_tokens=False)), *parser.finish()]
        text = "".join(e.text for e in events if type(e).__name__ == "Content")
        assert len(text) == 2
        assert text.isdigit()


@pytest.mark.parametrize("prompt", [INSIDE, OPEN])
def test_tags_that_a_checkpoint_declares_special_are_shown_to_the_parser(prompt):
    backend = BUILDERS["byte_level"]()
    backend.add_special_tokens(["<think>", "</think>"])
    tokenizer = Tokenizer(backend, eos_token_ids=[backend.token_to_id("<|end|>")])
    m = matcher(prompt, tokenizer)
    ids = [*([THINK] if prompt == OPEN else []), WORD, UNTHINK, *tokenizer.encode("42")]
    assert accepts(m, ids)
    assert m.finished
    parser = make_parser(None, "qwen3", prompt)
    events = [*parser.push(tokenizer.decode(ids)), *parser.finish()]
    assert [(type(e).__name__, e.text) for e in events] == [("Reasoning", "f"), ("Content", "42")]


def test_a_constraint_keeps_its_kind_through_the_parameters():
    outputs = constrain_answer(StructuredOutputs(json={"type": "null"}), INSIDE)
    assert SamplingParams(structured_outputs=outputs).structured_outputs is outputs
    assert outputs.json == {"type": "null"}
