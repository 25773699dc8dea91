"""Token ids are transformers' ids; a folder that cannot work says what to do."""

import json

import pytest
from tokenizers import Tokenizer as Backend

from jaxserve.errors import CheckpointError, RequestError
from jaxserve.text.tokenizer import Tokenizer

KINDS = ["byte_level", "llama", "gemma", "word_level"]
TEXTS = [
    "",
    " ",
    "The quick brown fox",
    "  two  spaces and a trailing one ",
    "naïve café — 日本語, Ελληνικά, हिन्दी, 🙂👩‍👩‍👧‍👦",
    "tabs\tand\r\nlines\n\n\n",
    "<|im_start|>user\nhi<|im_end|> <s> and </s> [EOS]<think>x</think>",
    'combining e\u0301, nul \x00, "quotes" and \u200b zero width',
]


@pytest.fixture
def fast(transformers):
    """Makes their tokenizer of a backend."""
    return lambda backend, **options: transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, **options
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_ids_are_those_of_transformers(fast, backends, kind, add_special_tokens):
    ours, theirs = Tokenizer(backends[kind]), fast(backends[kind])
    expected = [theirs.encode(t, add_special_tokens=add_special_tokens) for t in TEXTS]
    assert [ours.encode(t, add_special_tokens) for t in TEXTS] == expected
    assert ours.encode_batch(TEXTS, add_special_tokens) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [True, False])
def test_decoding_is_that_of_transformers(fast, backends, kind, skip):
    ours, theirs = Tokenizer(backends[kind]), fast(backends[kind])
    for text in TEXTS:
        ids = theirs.encode(text)
        expected = theirs.decode(ids, skip_special_tokens=skip)
        assert ours.decode(ids, skip_special_tokens=skip) == expected
        assert [ours.token_text(i) for i in ids] == [theirs.decode([i]) for i in ids]


@pytest.mark.parametrize("declared", ["strings", "dicts", "added_tokens_decoder", "map"])
def test_special_tokens_may_be_declared_in_any_of_the_files(
    transformers, backends, folder, declared
):
    names = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    as_dicts = {k: {"__type": "AddedToken", "content": v, **plain} for k, v in names.items()}
    backend = Backend.from_str(backends["byte_level"].to_str())
    decoder = {"428": {"content": "<|pad|>", "special": True, **plain}}
    files = {
        "strings": {"tokenizer_config": names},
        "dicts": {"tokenizer_config": as_dicts},
        "added_tokens_decoder": {"tokenizer_config": {**names, "added_tokens_decoder": decoder}},
        "map": {"tokenizer_config": {}, "special_tokens_map": names},
    }[declared]
    path = folder(backend, **files)
    ours, theirs = Tokenizer.from_folder(path), transformers.AutoTokenizer.from_pretrained(path)
    text = "<|begin|>a <|pad|> b<|end|><|im_end|>"
    assert ours.encode(text) == theirs.encode(text)
    assert (ours.bos_token_id, ours.vocab_size) == (theirs.bos_token_id, len(theirs))
    assert ours.eos_token_ids == {theirs.eos_token_id}
    assert ours.special_tokens == names
    assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), True)


def test_extra_special_tokens_become_whole_tokens(transformers, backends, folder):
    path = folder(
        backends["llama"], tokenizer_config={"additional_special_tokens": ["[INST]", "fox"]}
    )
    ours, theirs = Tokenizer.from_folder(path), transformers.AutoTokenizer.from_pretrained(path)
    text = "[INST] the fox jumps [INST]"
    assert ours.encode(text) == theirs.encode(text)
    assert ours.special_ids == set(theirs.added_tokens_decoder)


@pytest.mark.parametrize("bos", [None, True, False])
@pytest.mark.parametrize("eos", [None, True, False])
def test_bos_and_eos_options_count_when_tokenizer_json_adds_nothing(
    fast, backends, folder, bos, eos
):
    config = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    config |= {k: v for k, v in [("add_bos_token", bos), ("add_eos_token", eos)] if v is not None}
    ours = Tokenizer.from_folder(folder(backends["byte_level"], tokenizer_config=config))
    assert ours.encode("hi") == fast(backends["byte_level"], **config).encode("hi")
    assert ours.encode("hi", add_special_tokens=False) == backends["byte_level"].encode("hi").ids


def test_a_post_processor_is_not_doubled(transformers, backends, folder):
    config = {"bos_token": "<s>", "add_bos_token": True, "tokenizer_class": "LlamaTokenizer"}
    path = folder(backends["llama"], tokenizer_config=config)
    assert Tokenizer.from_folder(path).encode("the fox").count(1) == 1
    assert Tokenizer.from_folder(path).encode(
        "the fox"
    ) == transformers.AutoTokenizer.from_pretrained(path).encode("the fox")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, set()),
        ({"tokenizer_config": {"eos_token": "<|end|>"}}, {"<|end|>"}),
        ({"generation_config": {"eos_token_id": 7}}, {7}),
        (
            {
                "tokenizer_config": {"eos_token": "<|im_end|>"},
                "generation_config": {"eos_token_id": [7, 8]},
                "config": {"eos_token_id": 9},
            },
            {"<|im_end|>", 7, 8},
        ),
        ({"config": {"eos_token_id": 9}}, {9}),
    ],
)
def test_eos_is_the_union_of_what_the_files_say(backends, folder, files, expected):
    backend = backends["byte_level"]
    found = Tokenizer.from_folder(folder(backend, **files)).eos_token_ids
    assert found == {backend.token_to_id(e) if isinstance(e, str) else e for e in expected}


def test_chat_templates_from_every_place(backends, folder):
    named = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "T"}]
    path = folder(backends["byte_level"], tokenizer_config={"chat_template": named})
    assert Tokenizer.from_folder(path).chat_templates == {"default": "A", "tool_use": "T"}
    (path / "chat_template.json").write_text(json.dumps({"chat_template": "B"}))
    assert Tokenizer.from_folder(path).chat_templates["default"] == "B"
    (path / "chat_template.jinja").write_text("C")
    assert Tokenizer.from_folder(path).chat_templates == {"default": "C", "tool_use": "T"}


def test_truncation_and_padding_in_the_file_are_ignored(backends, folder):
    backend = Backend.from_str(backends["byte_level"].to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    text = "The quick brown fox jumps over the lazy dog"
    ours = Tokenizer.from_folder(folder(backend))
    assert ours.encode(text) == backends["byte_level"].encode(text).ids


def test_unknown_ids_are_no_text(backends):
    for backend in backends.values():
        ours = Tokenizer(backend)
        for i in (ours.vocab_size, -1, 2**40):
            assert ours.id_to_token(i) is None
            assert ours.token_text(i) == ""
        known = backend.encode("the fox").ids
        assert ours.decode([*known, ours.vocab_size]) == ours.decode(known)


def test_half_a_surrogate_pair_is_the_request_s_fault(backends):
    with pytest.raises(RequestError, match="surrogate") as raised:
        Tokenizer(backends["byte_level"]).encode("a\ud800")
    assert raised.value.param == "prompt"


def test_check_vocab(backends, caplog):
    ours = Tokenizer(backends["byte_level"])
    ours.check_vocab(ours.vocab_size)
    ours.check_vocab(ours.vocab_size + 64)
    assert not caplog.records
    ours.check_vocab(ours.vocab_size - 1)  # the last id is an added token
    assert "</tool_call>" in caplog.text
    with pytest.raises(CheckpointError, match="another model"):
        ours.check_vocab(300)


@pytest.mark.parametrize("only", ["tokenizer.model", "tekken.json"])
def test_a_folder_without_tokenizer_json_names_the_remedy(tmp_path, only):
    (tmp_path / only).write_bytes(b"\x00")
    with pytest.raises(CheckpointError, match=f"{only}; convert it once .*save_pretrained"):
        Tokenizer.from_folder(tmp_path)


def test_unreadable_files_are_checkpoint_errors(backends, folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer.from_folder(tmp_path)
    path = folder(backends["llama"])
    (path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        Tokenizer.from_folder(path)
