"""Tokens that stand before every text: where a soft prompt's embeddings go."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, processors

from jaxserve.text.tokenizer_files import TokenizerFiles


def add_virtual_tokens(source: Path, target: Path, count: int) -> int:
    """Copies a folder's tokenizer, with `count` more tokens that it puts before every text.

    Chat templates begin with them too.

    Returns:
        The id of the first; the others follow.
    """
    files = TokenizerFiles.read(source)
    backend = files.build()
    names = [f"<|virtual_{i}|>" for i in range(count)]
    first = 1 + max(backend.get_vocab(with_added_tokens=True).values())
    backend.add_special_tokens(names)
    before, after = _around(backend)
    single = [*names, *before, "$A", *after]
    ids = [(name, backend.token_to_id(name)) for name in dict.fromkeys(single) if name != "$A"]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    target.mkdir(parents=True, exist_ok=True)
    backend.save(str(target / "tokenizer.json"))
    templates = [
        {"name": name, "template": "".join(names) + text}
        for name, text in files.chat_templates.items()
    ]
    config = {k: v for k, v in files.config.items() if k != "chat_template"}
    if templates:
        config["chat_template"] = templates[0]["template"] if len(templates) == 1 else templates
    (target / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return first


def _around(backend: Tokenizer) -> tuple[list[str], list[str]]:
    """The tokens that the tokenizer puts before a text and after it."""
    text = "a"
    inner = backend.encode(text, add_special_tokens=False).tokens
    whole = backend.encode(text).tokens
    n = len(inner)
    at = next(i for i in range(len(whole)) if whole[i : i + n] == inner)
    return whole[:at], whole[at + n :]
