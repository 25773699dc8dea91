"""A stream of pieces is the whole text, whatever the chunks; it never runs past a stop string."""

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.text.detokenize import Detokenizer
from jaxserve.text.tokenizer import Tokenizer

from .conftest import BUILDERS

TOKENIZERS = {name: Tokenizer(build()) for name, build in BUILDERS.items()}
TEXT = "The fox — naïve café, 日本語 🙂, and the dog.\n"


@st.composite
def streams(draw):
    """A tokenizer, tokens (of a text, or any at all) and a way to cut them into pushes."""
    tokenizer = TOKENIZERS[draw(st.sampled_from(sorted(TOKENIZERS)))]
    any_ids = st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=24)
    text_ids = st.text(max_size=20).map(lambda t: tokenizer.encode(t, add_special_tokens=False))
    ids = draw(st.one_of(any_ids, text_ids))
    cuts = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=6)))
    return tokenizer, ids, [ids[a:b] for a, b in itertools.pairwise([0, *cuts, len(ids)])]


@given(streams(), st.booleans())
@settings(deadline=None, max_examples=300)
def test_the_pieces_are_the_whole(stream, skip):
    tokenizer, ids, chunks = stream
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    pieces = [detokenizer.push(chunk) for chunk in chunks]
    assert detokenizer.consumed == len(chunks[-1])
    assert "".join([*pieces, detokenizer.flush()]) == tokenizer.decode(ids, skip)


@given(streams(), st.integers(0, 24))
@settings(deadline=None, max_examples=300)
def test_a_completion_continues_its_prompt(stream, n):
    tokenizer, ids, _ = stream
    prompt, ids = ids[:n], ids[n:]
    before = tokenizer.decode(prompt)
    detokenizer = Detokenizer(tokenizer, prompt)
    added = detokenizer.push(ids) + detokenizer.flush()
    if "\ufffd" not in before:  # else the prompt's last character may have been completed
        assert before + added == tokenizer.decode(prompt + ids)


@given(streams(), st.data())
@settings(deadline=None, max_examples=300)
def test_stop_strings(stream, data):
    tokenizer, ids, chunks = stream
    whole = tokenizer.decode(ids)
    inside = st.tuples(st.integers(0, max(0, len(whole) - 1)), st.integers(1, 4))
    cut = inside.map(lambda s: whole[s[0] : s[0] + s[1]] or "x")
    stop = data.draw(
        st.lists(st.one_of(cut, st.text("abe ", min_size=1, max_size=3)), min_size=1, max_size=3)
    )
    include = data.draw(st.booleans())
    expected, name = cut_at_stop(whole, stop, include)

    detokenizer = Detokenizer(tokenizer, stop=stop, include_stop=include)
    text, used = "", 0
    for chunk in chunks:
        text += detokenizer.push(chunk)
        used += detokenizer.consumed
        assert expected.startswith(text)
    text += detokenizer.flush()
    assert (text, detokenizer.stopped_by) == (expected, name)
    if name is None:
        assert used == len(ids)
    elif "\ufffd" not in whole:  # the last token used is the one that completed the stop string
        assert name in tokenizer.decode(ids[:used])
        assert cut_at_stop(tokenizer.decode(ids[: used - 1]), stop, False)[1] is None


def cut_at_stop(text: str, stop: list[str], include: bool) -> tuple[str, str | None]:
    """The specification, character by character."""
    for end in range(len(text) + 1):
        if done := [s for s in stop if text[:end].endswith(s)]:
            longest = max(done, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


def test_text_is_released_as_soon_as_it_is_certain():
    tokenizer = TOKENIZERS["byte_level"]
    ids = [tokenizer.backend.token_to_id(c) for c in "axaby"]
    detokenizer = Detokenizer(tokenizer, stop=["abc"])
    assert [detokenizer.push([i]) for i in ids] == ["", "ax", "", "", "aby"]


@pytest.mark.parametrize("kind", ["byte_level", "llama", "gemma"])
def test_half_a_character_is_never_shown(kind):
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode("🙂€", add_special_tokens=False)
    assert len(ids) >= 7  # not in the vocabulary: one token for each byte
    detokenizer = Detokenizer(tokenizer, tokenizer.encode("so"))
    assert [p for i in ids if (p := detokenizer.push([i]).strip())] == ["🙂", "€"]
    assert detokenizer.push(ids[-3:-1]) == ""
    assert detokenizer.flush() == "\ufffd"


def test_the_prompt_may_end_inside_a_character():
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("€")
    assert Detokenizer(tokenizer, ids[:2]).push(ids[2:]) == "€"


def test_malformed_bytes_do_not_harm_their_neighbours():
    tokenizer = TOKENIZERS["llama"]
    run = "é".encode() + b"\xff" + "é".encode()
    ids = [tokenizer.backend.token_to_id(f"<0x{b:02X}>") for b in run]
    assert tokenizer.decode(ids) == "é\ufffdé"


def test_min_tokens_lets_early_stop_strings_pass():
    tokenizer = TOKENIZERS["byte_level"]
    ids = [tokenizer.backend.token_to_id(c) for c in "xabab"]
    for min_tokens, expected in [(0, "x"), (2, "x"), (3, "xab"), (4, "xab"), (5, "xabab")]:
        detokenizer = Detokenizer(tokenizer, stop=["ab"], min_tokens=min_tokens)
        assert detokenizer.push(ids) + detokenizer.flush() == expected


def test_nothing_follows_a_stop_string():
    tokenizer = TOKENIZERS["byte_level"]
    detokenizer = Detokenizer(tokenizer, stop=["fox"])
    assert detokenizer.push(tokenizer.encode("the fox jumps")) == "the "
    assert (detokenizer.push(tokenizer.encode("over")), detokenizer.consumed) == ("", 0)
    assert detokenizer.flush() == ""


@pytest.mark.parametrize("stop", [(), ("\n\n", "</s>", "User:", "Observation:")])
def test_five_microseconds_per_token(stop):
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode(TEXT * 50)
    best = min(seconds_per_token(tokenizer, ids, stop) for _ in range(5))
    assert best < 5e-6


def seconds_per_token(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...]) -> float:
    detokenizer = Detokenizer(tokenizer, stop=stop)
    start = time.perf_counter()
    for token in ids:
        detokenizer.push((token,))
    return (time.perf_counter() - start) / len(ids)
