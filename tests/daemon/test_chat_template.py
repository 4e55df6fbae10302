"""Chat templates, rendered as transformers renders them; and those that would stop a daemon."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import transformers

from spilld.errors import (
    Draining,
    InvalidRequest,
    PromptTooLong,
    SpilldError,
)
from spilld.protocol.messages import Message
from spilld.tokenizer.chat_template import ChatTemplate
from spilld.tokenizer.template_process import MEMORY_BYTES, Renderer
from spilld.tokenizer.tokenizer import Tokenizer

from .tiny_models import CHAT_TEMPLATE, SPECIAL, byte_level

NAMES = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[2], "pad_token": SPECIAL[3]}
LIMIT = 100_000

LLAMA = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}{{ item['text'] | trim }}{%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\n'}}
{%- endif -%}
"""
REASONING = """{%- set ns = namespace(last=messages|length - 1, found=false) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' and not ns.found %}
        {%- set ns.last = messages|length - 1 - loop.index0 %}
        {%- set ns.found = true %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
            {%- if loop.index0 > ns.last %}
                {%- set content = '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content %}
            {%- endif %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""
PARTS = "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
TOOLS = """{% if tools %}{{ tools | tojson }}{% endif %}{% if documents is none %}no documents{% endif %}
{% for message in messages %}
    {% if loop.index > 2 %}
        {% continue %}
    {% endif %}
{% generation %}
{% set inner = message %}
{{ message | tojson }}{{ message | tojson(indent=2) }}{{ message | tojson(ensure_ascii=True) }}
{% endgeneration %}
{{ inner is defined }}{{ dict(a=1) }}{{ dict.fromkeys([1, 2], 'x') }}
{% endfor %}
{{ strftime_now('%Y') }}{{ messages | map(attribute='content') | join('|') }}{{ messages | length }}
"""
UPPER = "{% for m in messages %}{{ bos_token }}{{ m.content | upper }}{% endfor %}"

TEMPLATES = {
    "tiny": CHAT_TEMPLATE,
    "llama": LLAMA,
    "gemma": GEMMA,
    "reasoning": REASONING,
    "parts": PARTS,
    "tools": TOOLS,
    "upper": UPPER,
    "namespace": "{% set ns = namespace(a=1) %}{% set ns._b = 2 %}{{ ns.a }}",
    "private": "{% set ns = namespace(_a=1) %}x",
    "escape": "{{ messages.__class__.__mro__ }}{{ ''.__class__ }}",
    "dict": "{{ dict.__class__ }}{{ dict.mro }}",
    "wide": "{{ range(10**9) | length }}",
    "mutates": "{{ messages.append(1) }}",
    "syntax": "{% for m in messages %}",
    "unknown filter": "{{ messages | nonsense }}",
    "missing": "{{ nothing.at.all }}",
    "refuses": "{{ raise_exception('roles must alternate') }}",
    "divides": "{{ 1 // 0 }}",
    "recursive": "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    "index": "{{ messages[7].content }}",
}


def turn(role: str, content: str) -> Message:
    return Message(role=role, content=content)


CHATS = {
    "one": [turn("user", "Say é😀!")],
    "system": [
        turn("system", " Be brief.\n"),
        turn("user", "Hi"),
        turn("assistant", "\tYes "),
        turn("user", "?"),
    ],
    "two users": [turn("user", "a"), turn("user", "b")],
    "reasoning": [turn("user", "a"), turn("assistant", "<think>\nhm\n</think>\n\nyes"), turn("user", "b")],
    "begun": [turn("user", "a"), turn("assistant", "Sure, here ")],
    "begun with reasoning": [turn("user", "a"), turn("assistant", "<think>\nhm\n</think>\nyes")],
    "begun with nothing": [turn("user", "a"), turn("assistant", "")],
    "a tool's": [turn("user", "a"), turn("tool", '{"a": "b"}')],
}


@pytest.fixture(scope="module")
def reference() -> Any:
    return byte_level()


def expected(reference: Any, template: str, chat: list[Message]) -> str | None:
    """What transformers makes of it, None where it raises."""
    begun = chat[-1].role == "assistant"
    try:
        text: str = reference.apply_chat_template(
            [{"role": message.role, "content": message.content} for message in chat],
            chat_template=template,
            tokenize=False,
            add_generation_prompt=not begun,
            continue_final_message=begun,
        )
    except Exception:  # noqa: BLE001 (whatever it is)
        return None
    return text.replace("CONTINUE_FINAL_MESSAGE_TAG ", "")  # where a template writes a message twice


@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_what_transformers_renders(name: str, reference: Any) -> None:
    template = TEMPLATES[name]
    renderer = Renderer(template, NAMES, {})
    for chat in CHATS.values():
        turns = [(message.role, message.content) for message in chat]
        try:
            rendered = renderer.render(turns, "continue" if chat[-1].role == "assistant" else "answer", LIMIT)
        except Exception:  # noqa: BLE001 (whatever it is)
            rendered = None
        assert rendered == expected(reference, template, chat)


def test_some_are_rendered() -> None:
    """What is equal above is not always an error."""
    turns = [(message.role, message.content) for message in CHATS["one"]]
    texts = {
        name: Renderer(TEMPLATES[name], NAMES, {}).render(turns, "answer", LIMIT)
        for name in list(TEMPLATES)[:7]
    }
    assert all(texts.values())


def test_the_model_here_as_transformers(smollm2_float32: Path) -> None:
    template = (smollm2_float32 / "chat_template.jinja").read_text()
    reference = transformers.AutoTokenizer.from_pretrained(smollm2_float32, local_files_only=True)
    ours = Tokenizer.load(smollm2_float32)
    for chat in CHATS.values():
        begun = chat[-1].role == "assistant"
        ids = reference.apply_chat_template(
            [{"role": message.role, "content": message.content} for message in chat],
            add_generation_prompt=not begun,
            continue_final_message=begun,
            return_dict=False,
        )
        assert ours.chat(chat) == ids
    assert template
    ours.close()


@contextmanager
def process(source: str) -> Iterator[ChatTemplate]:
    template = ChatTemplate(source, NAMES, {})
    try:
        yield template
    finally:
        template.close()


HELLO = [("user", "hello")]


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "does not end"),
        (
            "{% set ns = namespace(s='x') %}{% for a in range(99) %}{% set ns.s = ns.s * 16 %}{% endfor %}",
            "memory",
        ),
        ("{{ 'x' * 10**11 }}", "memory"),
        ("{{ ('%0' + '9' * 11 + 'd') % 1 }}", "memory|fails"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "RecursionError"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "fails"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{% for m in messages %}", "line 1"),
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate"),
        ("{{ messages[0].content.__class__.__base__.__subclasses__() }}", "unsafe|refuses"),
    ],
    ids=[
        "loops",
        "grows",
        "multiplies",
        "pads",
        "recurses",
        "nested",
        "divides",
        "syntax",
        "refuses",
        "escapes",
    ],
)
def test_a_fault_is_the_template_s(source: str, fault: str) -> None:
    """Typed, naming the template, and the next request has its answer."""
    with process("{% if messages[0].content == 'good' %}fine{% else %}" + source + "{% endif %}") as template:
        began = time.monotonic()
        with pytest.raises(InvalidRequest, match=f"chat template.*({fault})") as raised:
            template.render(HELLO, "answer", LIMIT)
        assert time.monotonic() - began < 60
        assert "\n" not in str(raised.value)
        if "line 1" not in fault and "nested" not in fault and "(" * 100 not in source:
            assert template.render([("user", "good")], "answer", LIMIT) == "fine"


def test_memory_is_bounded() -> None:
    """By the kernel; whether the process can still say so is another matter."""
    greedy = 2 * "{{ messages[0].content * 10**8 }}"
    with process("{% if messages[0].content == 'good' %}fine{% else %}" + greedy + "{% endif %}") as template:
        assert template.render([("user", "good")], "answer", LIMIT) == "fine"
        assert template._running is not None
        limits = Path(f"/proc/{template._running._process.pid}/limits").read_text()
        (bound,) = (line.split()[3] for line in limits.splitlines() if line.startswith("Max address space"))
        assert int(bound) == MEMORY_BYTES
        with pytest.raises(InvalidRequest, match="chat template"):
            template.render(HELLO, "answer", LIMIT)


def test_output_is_bounded() -> None:
    with process("{% for a in range(99999) %}{{ 'x' * 100 }}{% endfor %}") as template:
        with pytest.raises(PromptTooLong):
            template.render(HELLO, "answer", LIMIT)
        with pytest.raises(PromptTooLong):
            template.render(HELLO, "answer", LIMIT)


def test_a_process_that_was_killed_is_replaced() -> None:
    with process("{{ messages[0].content }}") as template:
        assert template.render(HELLO, "answer", LIMIT) == "hello"
        assert template._running is not None
        os.kill(template._running._process.pid, 9)
        template._running._process.wait()
        assert template.render(HELLO, "answer", LIMIT) == "hello"


def test_closing_ends_a_rendering() -> None:
    with process(
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    ) as template:
        template.start()
        raised: list[SpilldError] = []

        def render() -> None:
            try:
                template.render(HELLO, "answer", LIMIT)
            except SpilldError as error:
                raised.append(error)

        thread = threading.Thread(target=render)
        thread.start()
        time.sleep(0.05)
        template.close()
        thread.join(20)
        assert not thread.is_alive()
        assert isinstance(raised[0], Draining)


def test_warm_renderings_take_milliseconds() -> None:
    with process(CHAT_TEMPLATE) as template:
        template.render(HELLO, "answer", LIMIT)
        best = 1.0
        for _ in range(20):
            began = time.perf_counter()
            template.render(HELLO, "answer", LIMIT)
            best = min(best, time.perf_counter() - began)
        assert best < 0.1
