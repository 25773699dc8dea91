"""Prompts from what clients send: texts, token ids and conversations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.errors import RequestError
from jaxserve.server.errors import ApiError
from jaxserve.server.openai import Content, Effort, Message
from jaxserve.server.state import Server
from jaxserve.server.turn import Prompt
from jaxserve.text.chat import render_chat

Conversation = list[dict[str, Any]]
"""Messages as chat templates read them; tool arguments are objects, not JSON text."""


def text_prompts(
    server: Server, given: str | list[Any], add_special_tokens: bool | None, param: str = "prompt"
) -> list[Prompt]:
    """One prompt per text or list of token ids.

    Args:
        given: a text, token ids, or a list of either.
        add_special_tokens: None adds them, as OpenAI does.
        param: the request field, for messages.
    """
    if not isinstance(given, str) and given and all(isinstance(x, int) for x in given):
        given = [given]
    items = [given] if isinstance(given, str) else given
    if not items:
        raise RequestError(f"{param} is empty; send at least one text or token id", param)
    special = add_special_tokens is not False
    prompts = [_text_prompt(server, item, special, param) for item in items]
    for prompt in prompts:
        check_length(server, prompt.token_ids, param)
    return prompts


def _text_prompt(server: Server, item: Any, special: bool, param: str) -> Prompt:
    match item:
        case str():
            return Prompt(server.llm.tokenizer.encode(item, add_special_tokens=special), item)
        case list():
            return Prompt(item)
        case _:
            raise RequestError(f"{param} mixes token ids with texts or lists; send one kind", param)


def check_length(server: Server, token_ids: Sequence[int], param: str) -> None:
    """Refuses an empty prompt and one that leaves no room to answer in."""
    if not token_ids:
        raise RequestError(f"{param} has no tokens; send at least one", param)
    room = server.llm.max_model_len - 1
    limit = min(room, server.limits.max_prompt_tokens or room)
    if len(token_ids) > limit:
        raise ApiError(
            400,
            f"{param} has {len(token_ids)} tokens, at most {limit} are accepted "
            f"(the context is {server.llm.max_model_len}); shorten it",
            param=param,
            code="context_length_exceeded",
        )


def chat_prompt(
    server: Server,
    conversation: Conversation,
    tools: list[dict[str, Any]] | None = None,
    *,
    template_kwargs: Mapping[str, Any] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    add_special_tokens: bool = False,
    param: str = "messages",
) -> Prompt:
    """The conversation through the model's chat template. Templates write their own BOS."""
    tokenizer = server.llm.tokenizer
    template = chat_template(server)
    for name in template_kwargs or ():
        if name not in template:
            raise RequestError(
                f"the model's chat template knows no {name!r}; remove it",
                f"chat_template_kwargs.{name}",
            )
    text = render_chat(
        tokenizer,
        [_known_role(message, template) for message in conversation],
        tools=tools,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        chat_template_kwargs=template_kwargs,
    )
    token_ids = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    check_length(server, token_ids, param)
    return Prompt(token_ids, text)


def chat_template(server: Server) -> str:
    """The source of the model's templates; "" for a model without one."""
    return "\n".join(server.llm.tokenizer.chat_templates.values())


def _known_role(message: dict[str, Any], template: str) -> dict[str, Any]:
    """OpenAI renamed "system" to "developer"; most templates do not know."""
    if message["role"] == "developer" and "developer" not in template:
        return message | {"role": "system"}
    return message


def effort_kwargs(server: Server, effort: Effort | None, param: str) -> dict[str, Any]:
    """`reasoning_effort` as what the model's template understands; refused where it has no such."""
    if effort is None:
        return {}
    template = chat_template(server)
    if "reasoning_effort" in template:
        return {"reasoning_effort": effort}
    if effort == "none" and "enable_thinking" in template:
        return {"enable_thinking": False}
    raise RequestError(
        f"{param}={effort!r} cannot be honoured: the model's chat template has no such setting; "
        "remove it",
        param,
    )


def conversation_of(messages: Sequence[Message]) -> Conversation:
    """OpenAI's messages as templates read them."""
    return [_plain(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _plain(message: Message, param: str) -> dict[str, Any]:
    plain: dict[str, Any] = {"role": message.role, "content": joined(message.content)}
    if message.content is None and not message.tool_calls and message.role != "assistant":
        raise RequestError(f"{param}.content is required of a {message.role} message", param)
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, name)) is not None:
            plain[name] = value
    if message.tool_calls:
        plain["tool_calls"] = [
            tool_call(call.id, call.function.name, call.function.arguments, f"{param}.tool_calls")
            for call in message.tool_calls
        ]
    return plain


def joined(content: Content | None) -> str:
    """Text parts as one text."""
    if isinstance(content, list):
        return "\n".join(part.text for part in content)
    return content or ""


def tool_call(call_id: str, name: str, arguments: str, param: str) -> dict[str, Any]:
    """A past call as templates read it."""
    try:
        parsed = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise RequestError(
            f"{param}: the arguments of {name!r} must be a JSON object as text, "
            f"got {arguments!r:.80}",
            param,
        )
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": parsed}}
