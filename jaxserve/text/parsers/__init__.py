"""Reasoning and tool calls in what models write, for whole texts and for streams."""

from __future__ import annotations

from jaxserve.errors import ConfigError
from jaxserve.text.parsers.events import (
    Content,
    Event,
    OutputParser,
    Reasoning,
    ToolCall,
)
from jaxserve.text.parsers.harmony import HarmonyParser
from jaxserve.text.parsers.reasoning import PlainParser, ThinkParser, reasoning_state
from jaxserve.text.parsers.tools import FORMATS, ToolParser, format_of
from jaxserve.text.parsers.xml_calls import Schemas

__all__ = [
    "REASONING_PARSERS",
    "TAGGED_REASONING",
    "TOOL_CALL_PARSERS",
    "Content",
    "Event",
    "OutputParser",
    "Reasoning",
    "ToolCall",
    "make_parser",
    "parsers_of",
]

TOOL_CALL_PARSERS = (*FORMATS, "openai")
"""Names for `--tool-call-parser`; they are vLLM's."""

TAGGED_REASONING = ("qwen3", "deepseek_r1")
"""Those that find reasoning between `<think>` and `</think>`, before the answer."""

REASONING_PARSERS = (*TAGGED_REASONING, "openai_gptoss")
"""Names for `--reasoning-parser`; they are vLLM's."""

_BY_MODEL_TYPE: dict[str, tuple[str | None, str | None]] = {
    "deepseek_v2": ("deepseek_v3", "deepseek_r1"),
    "deepseek_v3": ("deepseek_v3", "deepseek_r1"),
    "gpt_oss": ("openai", "openai_gptoss"),
    "llama": ("llama3_json", None),
    "ministral": ("mistral", None),
    "mistral": ("mistral", None),
    "mistral3": ("mistral", None),
    "mixtral": ("mistral", None),
    "qwen2": ("hermes", None),
    "qwen2_moe": ("hermes", None),
    "qwen3": ("hermes", "qwen3"),
    "qwen3_moe": ("hermes", "qwen3"),
    "qwen3_next": ("hermes", "qwen3"),
}


def parsers_of(model_type: str, chat_template: str = "") -> tuple[str | None, str | None]:
    """The tool-call and reasoning parsers that a `model_type` is known to need; None for none.

    Args:
        chat_template: tells Qwen3-Coder from Qwen3, whose type it shares.
    """
    tools, reasoning = _BY_MODEL_TYPE.get(model_type, (None, None))
    if "<function=" in chat_template and "<parameter=" in chat_template:
        tools = "qwen3_coder"
    return tools, reasoning


def make_parser(
    tool_call_parser: str | None = None,
    reasoning_parser: str | None = None,
    prompt: str | None = None,
    schemas: Schemas | None = None,
) -> OutputParser:
    """A parser for one completion.

    Args:
        tool_call_parser: one of TOOL_CALL_PARSERS; None leaves calls in the content.
        reasoning_parser: one of REASONING_PARSERS; None leaves reasoning in the content.
        prompt: the rendered prompt. Its end tells whether the completion begins inside the
            reasoning; without it, deepseek_r1 takes that for granted and qwen3 does not.
        schemas: of the parameters of each function, for calls whose notation shows no types.
    """
    _check("--tool-call-parser", tool_call_parser, TOOL_CALL_PARSERS)
    _check("--reasoning-parser", reasoning_parser, REASONING_PARSERS)
    if tool_call_parser == "openai" or reasoning_parser == "openai_gptoss":
        return HarmonyParser()  # one format holds both
    answer = PlainParser()
    if tool_call_parser is not None:
        answer = ToolParser(format_of(tool_call_parser, schemas or {}))
    if reasoning_parser is None:
        return answer
    inside = reasoning_parser == "deepseek_r1"
    if prompt is not None:
        inside = reasoning_state(prompt) == "inside"
    return ThinkParser(answer, inside)


def _check(flag: str, name: str | None, known: tuple[str, ...]) -> None:
    if name is not None and name not in known:
        raise ConfigError(f"{flag}={name!r} is not known; choose from {', '.join(known)}")
