"""A tokenizer of whole words, for models whose language is a task of ours."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

BOS, EOS, PAD, UNKNOWN = SPECIAL_TOKENS = ("<s>", "</s>", "<pad>", "<unk>")

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt and messages[-1]['content'].split()[-1:] != [':'] %}:{% endif %}"
)
"""A message is a prompt of the task; the colon that ends it may be left out."""


def write_word_tokenizer(folder: Path, words: Sequence[str]) -> int:
    """Writes tokenizer.json and tokenizer_config.json; the size of the vocabulary.

    One token per word, with the space before it; texts begin with `BOS`.

    Raises:
        ValueError: a word has a space in it, or comes twice.
    """
    if len(set(words)) < len(words) or any(len(word.split()) != 1 for word in words):
        raise ValueError("words must differ, and have no spaces in them")
    known = (*SPECIAL_TOKENS, *(f"\u2581{word}" for word in words))
    vocabulary = {token: i for i, token in enumerate(known)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": UNKNOWN,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return len(vocabulary)
