"""Messages to a prompt, by the checkpoint's chat template, as transformers renders it."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from jaxserve.errors import RequestError
from jaxserve.text.tokenizer import Tokenizer

Message = Mapping[str, Any]

_END = "CONTINUE_FINAL_MESSAGE_TAG "  # its space tells whether the template trims
_REASONING = ("reasoning_content", "thinking", "reasoning")  # one thing under three names


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """The prompt of a conversation. Encode it with `add_special_tokens=False`.

    Args:
        tools: OpenAI's descriptions of functions.
        documents: texts for templates that know retrieval.
        add_generation_prompt: end with the header of the assistant's turn.
        continue_final_message: end inside the last message, for the model to go on with.
        chat_template: Jinja text, or the name of one of the checkpoint's templates. The sandbox
            keeps it from the machine but not from looping: accept it from operators only.
        chat_template_kwargs: further names for the template, such as `enable_thinking`.

    Raises:
        RequestError: no template, or one that cannot render these messages.
    """
    if continue_final_message and add_generation_prompt:
        raise _refused(
            "continue_final_message needs add_generation_prompt=false", "continue_final_message"
        )
    source = _choose(tokenizer, chat_template, tools)
    template = _compile(source)
    chat = _prepare(messages, wants_parts=_wants_parts(source))
    names: dict[str, Any] = {
        "documents": None if documents is None else list(documents),
        "tools": None if tools is None else list(tools),
        "add_generation_prompt": add_generation_prompt,
        **tokenizer.special_tokens,
        **(chat_template_kwargs or {}),
    }
    if not continue_final_message:
        return _render(template, chat, names)
    _mark_end(chat)
    return _cut_at_mark(_render(template, chat, names))


# ---- the template ------------------------------------------------------------------------


def _choose(tokenizer: Tokenizer, given: str | None, tools: Sequence[Any] | None) -> str:
    """The template's text: the one given, the one for tools, or the checkpoint's own."""
    named = tokenizer.chat_templates
    if given is not None:
        return named.get(given, given)
    for name in ("tool_use", "default") if tools is not None else ("default",):
        if name in named:
            return named[name]
    if named:
        raise _refused(f"no default chat template; name one of {sorted(named)}", "chat_template")
    raise _refused(
        "this model has no chat template: start the server with --chat-template FILE, "
        "or send the prompt as text to /v1/completions"
    )


@functools.lru_cache(maxsize=64)
def _compile(source: str) -> jinja2.Template:
    try:
        return _environment().from_string(source)
    except jinja2.TemplateError as error:
        raise _refused(f"the chat template is not valid: {error}", "chat_template") from error


@functools.lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as chat templates expect it; they are programs from strangers, hence the sandbox."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    names: dict[str, Any] = environment.globals
    names["raise_exception"] = _raise_exception
    names["strftime_now"] = _strftime_now
    names["namespace"] = _PlainNamespace
    return environment


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's tokens for training; here it renders its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Macro) -> str:
        return caller()


class _PlainNamespace(Namespace):
    """A namespace whose names cannot reach into Python."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"{name!r}: a name may not begin with _")
        super().__setitem__(name, value)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which no model was trained on."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


@functools.lru_cache(maxsize=64)
def _wants_parts(source: str) -> bool:
    """Whether the template loops over a message's content, and so takes it as a list of parts."""
    tree = _environment().parse(source)
    aliases = {
        assign.target.name
        for assign in tree.find_all(nodes.Assign)
        if isinstance(assign.target, nodes.Name) and _reads_content(assign.node, set())
    }
    return any(_reads_content(loop.iter, aliases) for loop in tree.find_all(nodes.For))


def _reads_content(node: nodes.Node, aliases: set[str]) -> bool:
    """Whether the expression is some message's content, or a variable that holds it."""
    match node:
        case nodes.Name():
            return node.name in aliases
        case nodes.Getattr():
            return node.attr == "content"
        case nodes.Getitem():
            return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
        case nodes.Filter():
            return node.node is not None and _reads_content(node.node, aliases)
        case _:
            return False


# ---- the messages ------------------------------------------------------------------------


def _prepare(messages: Sequence[Message], wants_parts: bool) -> list[dict[str, Any]]:
    """Copies of the messages in the form that templates read."""
    if not messages:
        raise _refused("messages is empty; send at least one")
    return [_prepare_one(i, message, wants_parts) for i, message in enumerate(messages)]


def _prepare_one(i: int, message: Any, wants_parts: bool) -> dict[str, Any]:
    if not _is_message(message):
        raise _refused(f"messages[{i}] must be an object with a role, got {message!r:.80}")
    # A field that is null counts as absent: most templates would print "None".
    prepared: dict[str, Any] = {k: v for k, v in message.items() if v is not None}
    if reasoning := next((prepared[key] for key in _REASONING if key in prepared), None):
        prepared = {"thinking": reasoning, **prepared, "reasoning_content": reasoning}
    if isinstance(prepared.get("content"), list):
        texts = [_text_of(i, part) for part in prepared["content"]]
        prepared["content"] = (
            [{"type": "text", "text": text} for text in texts] if wants_parts else "\n".join(texts)
        )
    if calls := prepared.get("tool_calls"):
        prepared["tool_calls"] = [_with_arguments(i, call) for call in calls]
    return prepared


def _is_message(value: Any) -> bool:
    match value:
        case {"role": str()}:
            return True
        case _:
            return False


def _text_of(i: int, part: Any) -> str:
    match part:
        case str():
            return part
        case {"type": "text" | "input_text" | "output_text", "text": str(text)}:
            return text
        case {"type": "refusal", "refusal": str(text)}:
            return text
        case {"type": kind}:
            raise _refused(f"messages[{i}]: only text can be read, not a part of type {kind!r}")
        case _:
            raise _refused(f"messages[{i}]: a part of content needs a type, got {part!r:.80}")


def _with_arguments(i: int, call: Any) -> dict[str, Any]:
    """The tool call with its arguments as an object; OpenAI sends them as text."""
    match call:
        case {"function": {"arguments": str(text)} as function}:
            try:
                arguments = json.loads(text or "{}")
            except ValueError as error:
                raise _refused(f"messages[{i}]: a tool call's arguments: {error}") from error
            return {**call, "function": {**function, "arguments": arguments}}
        case {"function": {"name": str()}} | {"name": str()}:
            return dict(call)
        case _:
            raise _refused(f"messages[{i}]: a tool call must name a function, got {call!r:.80}")


# ---- rendering ---------------------------------------------------------------------------


def _render(template: jinja2.Template, chat: list[dict[str, Any]], names: Mapping[str, Any]) -> str:
    """Renders the chat; with a tool call's arguments as text if the template wants them so."""
    fault: Exception | None = None
    for messages in _spellings(chat):
        try:
            return template.render(messages=messages, **names)
        except TypeError as error:  # DeepSeek's template adds the arguments to a string
            fault = fault or error
        except Exception as error:  # whatever a stranger's program raises
            fault = error
            break
    raise _refused(f"the chat template refuses these messages: {fault}") from fault


def _spellings(chat: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The chat, and once more with arguments as JSON text if it has any."""
    yield chat
    if any("tool_calls" in message for message in chat):
        yield [_with_text_arguments(message) for message in chat]


def _with_text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    calls: list[dict[str, Any]] = []
    for call in message.get("tool_calls", ()):
        function = call.get("function", {})
        text = json.dumps(function.get("arguments", {}), ensure_ascii=False)
        calls.append({**call, "function": {**function, "arguments": text}})
    return {**message, "tool_calls": calls} if calls else message


def _mark_end(chat: list[dict[str, Any]]) -> None:
    """Appends the mark to the last message's last text. Changes `chat`."""
    last = chat[-1]
    match last.get("content"):
        case str(text):
            last["content"] = text + _END
        case [*_, {"text": str(text)}] as parts:
            last["content"] = [*parts[:-1], {"type": "text", "text": text + _END}]
        case _:
            raise _refused("continue_final_message: the last message has no text to go on with")


def _cut_at_mark(rendered: str) -> str:
    """The prompt up to the mark, without the space that a trimming template would have removed."""
    at = rendered.rfind(_END.strip())
    if at < 0:
        raise _refused("continue_final_message: the chat template leaves the last message out")
    trimmed = not rendered.startswith(_END, at)
    return rendered[:at].rstrip() if trimmed else rendered[:at]


def _refused(message: str, param: str = "messages") -> RequestError:
    return RequestError(message, param)
