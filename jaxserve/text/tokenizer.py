"""A checkpoint's tokenizer, read from its folder without transformers."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from jaxserve.errors import CheckpointError, RequestError
from jaxserve.text.token_bytes import TokenBytes
from jaxserve.text.tokenizer_files import TokenizerFiles

logger = logging.getLogger(__name__)

TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
"""Tokens that say what a text means, to parsers that read the text."""


class Tokenizer:
    """Text to token ids and back.

    Ids are those of `transformers.AutoTokenizer`, with one deliberate exception: `add_bos_token`
    and `add_eos_token` of tokenizer_config.json count when tokenizer.json adds no token itself.
    transformers 4 did so, and DeepSeek's and other models expect it; transformers 5 does not.

    Some checkpoints declare `TAGS` special. They are text all the same: a text without them would
    show reasoning and tool calls as the answer.

    Attributes:
        eos_token_ids: every id that ends a generation.
        bos_token_id: None if the checkpoint has none.
        special_ids: ids that `skip_special_tokens` leaves out.
        special_tokens: the named ones, as chat templates read them (`bos_token`, `eos_token`, ...).
        chat_templates: by name; most checkpoints have just "default".
        token_bytes: what each token adds to a text.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        eos_token_ids: Iterable[int] = (),
        chat_templates: Mapping[str, str] | None = None,
    ):
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.chat_templates = dict(chat_templates or {})
        eos = self._id_of("eos_token")
        self.eos_token_ids: frozenset[int] = frozenset(eos_token_ids)
        if eos is not None:
            self.eos_token_ids |= {eos}
        self.bos_token_id = self._id_of("bos_token")
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(
            i for i, token in added.items() if token.special and token.content not in TAGS
        )
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        self.token_bytes = TokenBytes(backend, self.special_ids)

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Reads tokenizer.json and, where present, the files beside it."""
        files = TokenizerFiles.read(Path(path))
        return cls(
            files.build(),
            special_tokens=files.named,
            eos_token_ids=files.eos_token_ids,
            chat_templates=files.chat_templates,
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with those that the model expects around it unless told not to."""
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = True
    ) -> list[list[int]]:
        """`encode` for many texts, on all cores and without holding the interpreter's lock."""
        try:  # the fast variant leaves out offsets, which nobody here reads
            found = self.backend.encode_batch_fast(
                list(texts), add_special_tokens=add_special_tokens
            )
        except TypeError as error:
            raise RequestError(_not_text(texts), "prompt") from error
        return [encoding.ids for encoding in found]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of the tokens; bytes that are not UTF-8 become U+FFFD, unknown ids nothing."""
        return self.token_bytes.join(ids, skip_special_tokens).decode("utf-8", "replace")

    def id_to_token(self, i: int) -> str | None:
        """The vocabulary's own spelling (`Ġthe`, `▁the`, `<0x0A>`); None for an unknown id."""
        try:
            return self.backend.id_to_token(i)
        except OverflowError:
            return None

    def token_text(self, i: int) -> str:
        """Text of one token by itself, as logprobs print it; "" for an unknown id."""
        return self.decode([i], skip_special_tokens=False)

    def has_words_of(self, other: Tokenizer) -> bool:
        """Whether every id means the same token to both."""
        ours, theirs = (t.backend.get_vocab(with_added_tokens=True) for t in (self, other))
        return ours == theirs

    def check_vocab(self, model_vocab_size: int) -> None:
        """Raises CheckpointError if text could encode to ids that the model has no embedding for.

        Added tokens beyond the model's vocabulary only draw a warning: gemma-3-1b, for one, carries
        the image token of its larger siblings. A larger model vocabulary is padding.
        """
        vocab = self.backend.get_vocab(with_added_tokens=True)
        outside = {token: i for token, i in vocab.items() if i >= model_vocab_size}
        added = {t.content for t in self.backend.get_added_tokens_decoder().values()}
        learned = sorted(outside.keys() - added)
        if learned:
            raise CheckpointError(
                f"the tokenizer has ids up to {max(outside.values())} but the model's vocabulary "
                f"is {model_vocab_size}; {len(learned)} ordinary tokens such as {learned[0]!r} lie "
                "outside. It belongs to another model: check the folder's tokenizer.json"
            )
        if outside:
            logger.warning("added tokens without an embedding, never to be sent: %s", outside)

    def _id_of(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)


def _not_text(texts: Sequence[Any]) -> str:
    """Says why the library refused one of these texts."""
    for text in texts:
        if not isinstance(text, str):
            return f"prompt must be text, got {type(text).__name__}"
    return "prompt holds half of a surrogate pair; send valid UTF-8"
