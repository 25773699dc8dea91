"""The tokenizer of whole words: transformers reads it, and spaces come back."""

import pytest

from jaxserve.text.tokenizer import Tokenizer
from jaxserve.text.virtual_tokens import add_virtual_tokens
from jaxserve.text.words import write_word_tokenizer

TEXT = "12 9 : 12 9 = 16 ; 16 |"


@pytest.fixture
def folder(tmp_path):
    write_word_tokenizer(tmp_path, [*TEXT.split()[:3], "=", "16", ";", "|"])
    return tmp_path


def test_spaces_come_back(transformers, folder):
    ours, theirs = Tokenizer.from_folder(folder), transformers.AutoTokenizer.from_pretrained(folder)
    ids = ours.encode(TEXT)
    assert ids == theirs(TEXT)["input_ids"]
    assert len(ids) == 1 + len(TEXT.split())
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == TEXT
    assert ours.decode(ids[3:]) == theirs.decode(ids[3:]) == TEXT.partition("9 ")[2]


def test_unknown_words_and_repeated_ones(folder, tmp_path):
    ours = Tokenizer.from_folder(folder)
    assert ours.encode("12 banana") == [0, ours.encode("12")[1], 3]
    with pytest.raises(ValueError, match="words must differ"):
        write_word_tokenizer(tmp_path, ["a", "a"])


def test_virtual_tokens_stand_before_texts_and_chats(transformers, folder, tmp_path):
    target = tmp_path / "grown"
    before = Tokenizer.from_folder(folder)
    first = add_virtual_tokens(folder, target, 3)
    ours, theirs = Tokenizer.from_folder(target), transformers.AutoTokenizer.from_pretrained(target)
    assert first == before.vocab_size
    ids = [first, first + 1, first + 2, *before.encode(TEXT)]
    assert ours.encode(TEXT) == theirs(TEXT)["input_ids"] == ids
    assert ours.decode(ids) == TEXT
    chat = theirs.apply_chat_template([{"role": "user", "content": "12 9 :"}], tokenize=False)
    assert theirs(chat, add_special_tokens=False)["input_ids"][:4] == [*ids[:3], 0]
