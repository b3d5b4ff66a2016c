"""Chat templates: a conversation and a Jinja template in, the text of the prompt out.

A template comes with the checkpoint and is not trusted: it runs in Jinja's sandbox, and what it
multiplies and writes is bounded. This file does not tokenize, and finds no templates.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Any

from puna.errors import TokenizerError
from puna.tokenizer.native import one_line

if TYPE_CHECKING:
    import jinja2

# The formats Meta trained Llama 2 Chat and Llama 3 Instruct on; Meta's directories state none.
LLAMA2_TEMPLATE = """\
{%- set system = namespace(text='') %}
{%- for message in messages %}
    {%- if message.role == 'system' and loop.first %}
        {%- set system.text = '<<SYS>>\\n' + message.content + '\\n<</SYS>>\\n\\n' %}
    {%- elif message.role == 'user' %}
        {{- bos_token + '[INST] ' + (system.text + message.content) | trim + ' [/INST]' }}
        {%- set system.text = '' %}
    {%- elif message.role == 'assistant' %}
        {{- ' ' + message.content | trim + ' ' + eos_token }}
    {%- else %}
        {{- raise_exception('Llama 2 has no place for a message of role ' + message.role) }}
    {%- endif %}
{%- endfor %}"""

LLAMA3_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
    {{- message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

MAX_RENDERED_CHARS = 2**26


def render_chat(
    template: str | None,
    messages: list[dict[str, str]],
    *,
    bos_token: str,
    eos_token: str,
    add_generation_prompt: bool,
) -> str:
    """Return the prompt text for `messages`; TokenizerError if the template fails on them."""
    if template is None:
        raise TokenizerError(
            "this tokenizer has no chat template; pass one with --chat-template, or a plain prompt"
        )
    _check_messages(messages)
    parts, length = [], 0
    try:
        for part in _compile(template).generate(
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            bos_token=bos_token,
            eos_token=eos_token,
            tools=None,
            documents=None,
        ):
            length += len(part)
            if length > MAX_RENDERED_CHARS:
                raise ValueError(f"it writes more than {MAX_RENDERED_CHARS} characters")
            parts.append(part)
    except Exception as error:  # a template can raise anything
        raise TokenizerError(
            f"the chat template failed ({one_line(error)}); "
            "change the messages, or pass another with --chat-template"
        ) from error
    return "".join(parts)


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise TokenizerError("a chat needs a list with at least one message")
    for message in messages:
        if not (
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
        ):
            raise TokenizerError(
                f'a message is {message!r:.80}; it needs text "role" and "content"'
            )


def _compile(template: str) -> jinja2.Template:
    from puna.tokenizer.sandbox import ChatEnvironment

    environment = ChatEnvironment()
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


def _to_json(value: Any, indent: int | None = None) -> str:
    """JSON for a prompt; Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    raise ValueError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
