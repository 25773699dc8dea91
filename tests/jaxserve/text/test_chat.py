"""Prompts are those of transformers' `apply_chat_template`; faults are the request's."""

# ruff: noqa: RUF001 - DeepSeek's tokens are spelled with fullwidth bars

import pytest

from jaxserve.errors import RequestError
from jaxserve.text.chat import render_chat
from jaxserve.text.tokenizer import Tokenizer

SPECIAL = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}

CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- '# Tools\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' }}{{- tool | tojson }}
    {%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] if message.role == 'user' %}
    {%- set ns.last = messages|length - loop.index %}
    {%- break %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'system' %}{%- continue %}{%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.reasoning_content is defined %}
        {{- '<think>\\n' + message.reasoning_content.strip() + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- content }}
    {%- for call in message.tool_calls or [] %}
        {%- set call = call.function or call %}
        {{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
        {{- call.arguments if call.arguments is string else call.arguments | tojson }}
        {{- '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "<|eot_id|>" }}
{% for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + tool_call.name }}
        {{- '", "parameters": ' }}{{- tool_call.arguments | tojson(indent=2) }}{{- "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """\
{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{% else %}{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}{% endif %}
{% endfor %}"""

DEEPSEEK = """\
{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{% set ns = namespace(is_first=true, system_prompt='') %}
{%- for message in messages %}{%- if message['role'] == 'system' %}
{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}
{{ bos_token }}{{ ns.system_prompt }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}{%- endif %}
    {%- if message['role'] == 'assistant' and 'tool_calls' in message %}
        {{- '<｜Assistant｜><｜tool▁calls▁begin｜>' }}
        {%- for tool in message['tool_calls'] %}
            {{- tool['type'] + '<｜tool▁sep｜>' + tool['function']['name'] + '\\n' + '```json' }}
            {{- '\\n' + tool['function']['arguments'] + '\\n' + '```' }}
        {%- endfor %}
    {%- elif message['role'] == 'assistant' %}
        {%- set content = message['content'] %}
        {%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
        {{- '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}
    {%- endif %}
{%- endfor -%}
{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"""

GEMMA = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set prefix = messages[0]['content'] + '\\n\\n' -%}{%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set prefix = "" -%}{%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
"""

GPT_OSS = """\
{%- macro describe(tools) -%}
    {%- for tool in tools %}
        {{- "type " + tool.function.name + " = (_: " }}
        {{- tool.function.parameters.properties.keys() | join(", ") + ") => any;\\n" }}
    {%- endfor %}
{%- endmacro -%}
{{- "<|start|>system<|message|>Reasoning: " + (reasoning_effort or "medium") + "<|end|>" }}
{%- if tools %}{{- "<|start|>developer<|message|>" + describe(tools) + "<|end|>" }}{%- endif %}
{%- for message in messages -%}
    {%- if message.role == 'assistant' -%}
        {%- if "thinking" in message and loop.last and not add_generation_prompt %}
            {{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}
        {%- endif %}
        {%- if "tool_calls" in message %}
            {%- set call = message.tool_calls[0].function %}
            {{- "<|start|>assistant to=functions." + call.name }}
            {{- "<|channel|>commentary json<|message|>" + call.arguments|tojson + "<|call|>" }}
        {%- else %}
            {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|end|>" }}
        {%- endif %}
    {%- elif message.role != 'tool' -%}
        {{- "<|start|>" + message.role + "<|message|>" + message.content + "<|end|>" }}
    {%- endif %}
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}
"""

TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "deepseek": DEEPSEEK,
    "gemma": GEMMA,
    "gpt_oss": GPT_OSS,
}

PLAIN = [{"role": "user", "content": ' Bonjour, <b>"ça"</b> va? 日本 '}]
LONG = [
    *PLAIN,
    {"role": "assistant", "content": "Yes. ", "name": None},
    {"role": "user", "content": "And & now?"},
]
SYSTEM = [{"role": "system", "content": "Be brief."}, *LONG]
THINKING = [*PLAIN, {"role": "assistant", "content": "4", "reasoning": "2+2"}]
CALL = {"name": "get_weather", "arguments": {"city": "Zürich", "days": 2}}
CALLING = [
    *PLAIN,
    {"role": "assistant", "tool_calls": [{"type": "function", "id": "c1", "function": CALL}]},
    {"role": "tool", "content": "sunny", "tool_call_id": "c1"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The <weather>.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


@pytest.fixture(scope="module")
def ours(backends):
    return Tokenizer(backends["byte_level"], special_tokens=SPECIAL)


@pytest.fixture(scope="module")
def theirs(backends, transformers):
    backend = backends["byte_level"]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)


CHATS = {"plain": PLAIN, "long": LONG, "system": SYSTEM, "thinking": THINKING, "calling": CALLING}
REFUSED = {("mistral", "system"), ("mistral", "calling"), ("deepseek", "calling")}
RENDERED = [(t, c) for t in TEMPLATES for c in CHATS if (t, c) not in REFUSED]


@pytest.mark.parametrize(("template", "chat"), RENDERED)
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("prompt", [True, False])
def test_the_prompt_is_that_of_transformers(ours, theirs, template, chat, tools, prompt):
    messages = CHATS[chat]
    options = {
        "tools": tools,
        "add_generation_prompt": prompt,
        "chat_template": TEMPLATES[template],
    }
    expected = theirs.apply_chat_template(messages, tokenize=False, **options)
    assert render_chat(ours, messages, **options) == expected


@pytest.mark.parametrize(
    ("template", "extra"),
    [
        ("chatml", {"enable_thinking": False}),
        ("llama3", {"date_string": "26 Jul 2024"}),
        ("gpt_oss", {"reasoning_effort": "high"}),
        ("mistral", {"bos_token": "<s>"}),
    ],
)
def test_further_names_for_the_template(ours, theirs, template, extra):
    text = TEMPLATES[template]
    rendered = render_chat(ours, PLAIN, chat_template=text, chat_template_kwargs=extra)
    assert rendered == theirs.apply_chat_template(
        PLAIN, tokenize=False, add_generation_prompt=True, chat_template=text, **extra
    )
    assert rendered != render_chat(ours, PLAIN, chat_template=text)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("text", ["The answer", "The answer is ", "x"])
def test_continuing_the_final_message(ours, theirs, template, text):
    messages = [*PLAIN, {"role": "assistant", "content": text}]
    options = {"chat_template": TEMPLATES[template], "continue_final_message": True}
    rendered = render_chat(ours, messages, add_generation_prompt=False, **options)
    assert rendered == theirs.apply_chat_template(messages, tokenize=False, **options)
    assert rendered.rstrip().endswith(text.strip())


def test_documents_reach_the_template(ours, theirs):
    text = (
        "{% for d in documents %}{{ d.title }}: {{ d.text }}\n{% endfor %}{{ messages[0].content }}"
    )
    options = {"documents": [{"title": "T", "text": "x < y"}], "chat_template": text}
    assert render_chat(ours, PLAIN, **options) == theirs.apply_chat_template(
        PLAIN, tokenize=False, **options
    )


PARTS = [{"role": "user", "content": [{"type": "text", "text": t} for t in ("one", "two")]}]
LOOP = "{% for m in messages %}{% for p in CONTENT %}<{{ p['text'] }}>{% endfor %}{% endfor %}"
CONTINUE = {"continue_final_message": True, "add_generation_prompt": False}


def calling(*calls) -> list[dict]:
    return [{"role": "assistant", "tool_calls": list(calls)}]


@pytest.mark.parametrize("template", ["chatml", "llama3", "mistral", "deepseek", "gpt_oss"])
def test_parts_are_joined_for_templates_that_want_text(ours, template):
    joined = [{"role": "user", "content": "one\ntwo"}]
    options = {"chat_template": TEMPLATES[template]}
    assert render_chat(ours, PARTS, **options) == render_chat(ours, joined, **options)


@pytest.mark.parametrize(
    "template",
    [
        GEMMA,
        LOOP.replace("CONTENT", "m.content | list"),
        "{% set c = messages[0].content %}{% for p in c %}<{{ p.text }}>{% endfor %}",
    ],
)
def test_parts_are_kept_for_templates_that_loop_over_them(ours, theirs, template):
    expected = theirs.apply_chat_template(
        PARTS, tokenize=False, add_generation_prompt=True, chat_template=template
    )
    assert render_chat(ours, PARTS, chat_template=template) == expected


@pytest.mark.parametrize("template", ["chatml", "llama3", "gpt_oss", "deepseek"])
def test_arguments_may_be_an_object_or_its_text(ours, template):
    text = {**CALL, "arguments": '{"city": "Zürich", "days": 2}'}
    as_text = [{**CALLING[1], "tool_calls": [{"type": "function", "function": text}]}]
    options = {"chat_template": TEMPLATES[template]}
    rendered = render_chat(ours, [PLAIN[0], *as_text], **options)
    assert rendered == render_chat(ours, CALLING[:2], **options)
    assert "Zürich" in rendered


def test_the_checkpoint_s_own_templates(backends):
    def with_templates(**templates):
        return Tokenizer(backends["byte_level"], chat_templates=templates)

    named = with_templates(default="D", tool_use="T", rag="R")
    assert render_chat(named, PLAIN) == "D"
    assert render_chat(named, PLAIN, tools=TOOLS) == "T"
    assert render_chat(named, PLAIN, chat_template="rag") == "R"
    assert render_chat(with_templates(default="D"), PLAIN, tools=TOOLS) == "D"
    with pytest.raises(RequestError, match="rag"):
        render_chat(with_templates(rag="R"), PLAIN)
    with pytest.raises(RequestError, match="--chat-template"):
        render_chat(with_templates(), PLAIN)


@pytest.mark.parametrize(
    ("messages", "options", "match", "param"),
    [
        ([], {}, "empty", "messages"),
        (["hi"], {}, "must be an object", "messages"),
        ([{"content": "x"}], {}, "role", "messages"),
        (SYSTEM, {"chat_template": MISTRAL}, "must alternate", "messages"),
        (PLAIN, {"chat_template": "{{ messages[0].nothing.at_all }}"}, "nothing", "messages"),
        (PLAIN, {"chat_template": "{{ 1 / 0 }}"}, "zero", "messages"),
        (PLAIN, {"chat_template": "{% if %}"}, "not valid", "chat_template"),
        (PLAIN, {"chat_template": "{{ ''.__class__.__mro__ }}"}, "unsafe", "messages"),
        (PLAIN, {"chat_template": "{{ messages.append(1) }}"}, "unsafe", "messages"),
        (PLAIN, {"chat_template": "{% set n = namespace() %}{% set n.__x = 1 %}"}, "_", "messages"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], {}, "image_url", "messages"),
        (calling({"function": {"name": "f", "arguments": "{"}}), {}, "arguments", "messages"),
        (calling(3), {}, "must name a function", "messages"),
        (PLAIN, {"continue_final_message": True}, "add_gen", "continue_final_message"),
        ([{"role": "user"}], CONTINUE, "no text", "messages"),
        (PLAIN, {**CONTINUE, "chat_template": "x"}, "leaves", "messages"),
    ],
)
def test_what_cannot_be_rendered_is_the_request_s_fault(ours, messages, options, match, param):
    with pytest.raises(RequestError, match=match) as raised:
        render_chat(ours, messages, **{"chat_template": CHATML, **options})
    assert raised.value.param == param


def test_messages_are_left_as_they_were(ours):
    message = {"role": "assistant", "content": [{"type": "text", "text": "a"}]}
    render_chat(ours, [message], chat_template=GEMMA, **CONTINUE)
    assert message == {"role": "assistant", "content": [{"type": "text", "text": "a"}]}
