"""What the files of a checkpoint folder say about its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import tokenizers
from tokenizers import processors

from jaxserve.errors import CheckpointError

_STANDARD = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
_OTHER_FORMATS = ("tokenizer.model", "tekken.json", "vocab.json")


@dataclass(frozen=True)
class TokenizerFiles:
    """tokenizer.json and the files beside it, read but not yet put together.

    Attributes:
        path: the folder.
        config: tokenizer_config.json, with special_tokens_map.json in the older layout.
        named: texts of `bos_token`, `eos_token` and other tokens with a role.
        eos_token_ids: the ids in generation_config.json, or else in config.json.
        chat_templates: by name.
    """

    path: Path
    config: dict[str, Any]
    named: dict[str, str]
    eos_token_ids: frozenset[int]
    chat_templates: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> TokenizerFiles:
        """Reads the folder; every file but tokenizer.json is optional."""
        config = _read_json(path / "tokenizer_config.json")
        if "added_tokens_decoder" not in config:  # the older layout
            config |= _read_json(path / "special_tokens_map.json")
        named = {
            key: value if isinstance(value, str) else value["content"]
            for key, value in config.items()
            if key.endswith("_token") and _is_token(value)
        }
        generation = path / "generation_config.json"  # transformers falls back in the same way
        eos = _read_json(generation if generation.exists() else path / "config.json")
        ids = frozenset(_listed(eos.get("eos_token_id")))
        return cls(path, config, named, ids, _chat_templates(path, config))

    def build(self) -> tokenizers.Tokenizer:
        """tokenizer.json, with what only the configuration declares."""
        backend = _read_backend(self.path)
        self._add_tokens(backend)
        self._add_bos_and_eos(backend)
        return backend

    def _add_tokens(self, backend: tokenizers.Tokenizer) -> None:
        by_id = self.config.get("added_tokens_decoder", {}).items()
        declared = [_added_token(spec) for _, spec in sorted(by_id, key=lambda kv: int(kv[0]))]
        known = {repr(token) for token in backend.get_added_tokens_decoder().values()}
        backend.add_tokens([token for token in declared if repr(token) not in known])
        added = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
        special = [_added_token(spec, special=True) for spec in self._special_tokens()]
        backend.add_special_tokens([token for token in special if token.content not in added])

    def _special_tokens(self) -> list[Any]:
        """Every token declared special outside tokenizer.json, in transformers' order."""
        get = self.config.get
        roles = [*_STANDARD, *sorted(self.named.keys() - _STANDARD)]
        extra = _listed(get("extra_special_tokens") or get("additional_special_tokens"))
        return [spec for spec in [*map(get, roles), *extra] if spec]

    def _add_bos_and_eos(self, backend: tokenizers.Tokenizer) -> None:
        """Carries out `add_bos_token` and `add_eos_token`, unless tokenizer.json adds tokens."""
        processor = backend.post_processor
        if processor is not None and processor.num_special_tokens_to_add(False):
            return
        bos, eos = (
            self.named.get(f"{role}_token") if self.config.get(f"add_{role}_token") else None
            for role in ("bos", "eos")
        )
        if tokens := [(t, backend.token_to_id(t)) for t in dict.fromkeys((bos, eos)) if t]:
            backend.post_processor = processors.TemplateProcessing(
                single=[part for part in (bos, "$A", eos) if part], special_tokens=tokens
            )


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    file = path / "tokenizer.json"
    if not file.exists():
        remedy = "copy it from where the checkpoint was downloaded"
        if others := [name for name in _OTHER_FORMATS if (path / name).exists()]:
            remedy = (
                f"it has {others[0]}; convert it once with transformers: "
                "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )
        raise CheckpointError(f"{path} has no tokenizer.json; {remedy}")
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more precise
        raise CheckpointError(f"{file} cannot be read as a tokenizer: {error}") from error


def _read_json(file: Path) -> dict[str, Any]:
    """The file's object; {} if there is no such file."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} must hold a JSON object, got {type(found).__name__}")
    return cast("dict[str, Any]", found)


def _chat_templates(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name. A file of its own wins over the entry in tokenizer_config.json."""
    templates: dict[str, str] = {}
    for holder in (config, _read_json(path / "chat_template.json")):
        match holder.get("chat_template"):
            case str(template):
                templates["default"] = template
            case list() | dict():
                templates |= _by_name(holder["chat_template"])
            case _:
                pass
    if (file := path / "chat_template.jinja").exists():
        templates["default"] = file.read_text(encoding="utf-8")
    for file in sorted(path.glob("additional_chat_templates/*.jinja")):
        templates[file.stem] = file.read_text(encoding="utf-8")
    return templates


def _by_name(templates: Any) -> dict[str, str]:
    """Named templates, written as a mapping or as a list of {"name", "template"}."""
    if isinstance(templates, dict):
        return cast("dict[str, str]", templates)
    return {entry["name"]: entry["template"] for entry in templates}


def _listed(value: Any) -> list[Any]:
    """The values of a list or a mapping, one value, or none."""
    match value:
        case None:
            return []
        case list():
            return cast("list[Any]", value)
        case dict():
            return list(cast("dict[str, Any]", value).values())
        case _:
            return [value]


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and "content" in value)


def _added_token(spec: Any, special: bool | None = None) -> tokenizers.AddedToken:
    """A token as the files write it, as text or with its options."""
    if isinstance(spec, str):
        return tokenizers.AddedToken(spec, special=bool(special), normalized=False)
    flags = {
        k: v for k, v in spec.items() if k in ("single_word", "lstrip", "rstrip", "normalized")
    }
    special = spec.get("special", False) if special is None else special
    return tokenizers.AddedToken(spec["content"], special=bool(special), **flags)
