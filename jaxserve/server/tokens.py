"""`/tokenize`, `/detokenize` and `/tokenizer_info`: the tokenizer, as vLLM's clients ask for it."""

from __future__ import annotations

import asyncio
from typing import Annotated

from msgspec import Meta, Struct
from starlette.responses import Response

from jaxserve.errors import RequestError
from jaxserve.server.openai import JsonObject, Message, Tool
from jaxserve.server.prompt import chat_prompt, conversation_of
from jaxserve.server.state import Exchange, Server
from jaxserve.server.tools import ToolUse
from jaxserve.server.wire import Body, TokenId, json_response


class TokenizeRequest(Body, kw_only=True):
    """A text or a conversation to encode; exactly one of `prompt` and `messages`."""

    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1)] | None = None
    model: str | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: JsonObject | None = None
    return_token_strs: bool = False


class Tokenized(Struct, kw_only=True):
    """The answer of `/tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Body, kw_only=True):
    """Token ids to decode."""

    tokens: list[TokenId]
    model: str | None = None


class Detokenized(Struct, kw_only=True):
    """The answer of `/detokenize`."""

    prompt: str


class TokenizerInfo(Struct, kw_only=True):
    """The answer of `/tokenizer_info`."""

    tokenizer_class: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: list[int]
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    chat_template: str | None


async def tokenize(exchange: Exchange, body: TokenizeRequest) -> Response:
    """Handles `POST /tokenize`."""
    server = exchange.server
    server.check_model(body.model)
    tokens = await asyncio.get_running_loop().run_in_executor(server.workers, _ids, server, body)
    tokenizer = server.llm.tokenizer
    strings = [tokenizer.id_to_token(i) or "" for i in tokens] if body.return_token_strs else None
    return json_response(
        Tokenized(
            count=len(tokens),
            max_model_len=server.llm.max_model_len,
            tokens=tokens,
            token_strs=strings,
        )
    )


def _ids(server: Server, body: TokenizeRequest) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("send either prompt or messages", "prompt")
    if body.messages is None:
        special = body.add_special_tokens is not False
        return server.llm.tokenizer.encode(body.prompt or "", add_special_tokens=special)
    tools = ToolUse.of([tool.function for tool in body.tools or ()], None)
    prompt = chat_prompt(
        server,
        conversation_of(body.messages),
        tools.for_template(),
        template_kwargs=body.chat_template_kwargs,
        add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
        continue_final_message=body.continue_final_message,
        add_special_tokens=bool(body.add_special_tokens),
    )
    return prompt.token_ids


async def detokenize(exchange: Exchange, body: DetokenizeRequest) -> Response:
    """Handles `POST /detokenize`."""
    server = exchange.server
    server.check_model(body.model)
    tokenizer = server.llm.tokenizer
    for i, token in enumerate(body.tokens):
        if token >= tokenizer.vocab_size:
            raise RequestError(
                f"tokens[{i}]={token} is outside the vocabulary of {tokenizer.vocab_size}",
                f"tokens[{i}]",
            )
    text = tokenizer.decode(body.tokens, skip_special_tokens=False)
    return json_response(Detokenized(prompt=text))


async def tokenizer_info(exchange: Exchange, _body: None) -> Response:
    """Handles `GET /tokenizer_info`."""
    llm = exchange.server.llm
    tokenizer, named = llm.tokenizer, llm.tokenizer.special_tokens
    return json_response(
        TokenizerInfo(
            tokenizer_class=type(tokenizer).__name__,
            vocab_size=tokenizer.vocab_size,
            max_model_len=llm.max_model_len,
            eos_token_ids=sorted(tokenizer.eos_token_ids),
            bos_token=named.get("bos_token"),
            eos_token=named.get("eos_token"),
            pad_token=named.get("pad_token"),
            chat_template=tokenizer.chat_templates.get("default"),
        )
    )
