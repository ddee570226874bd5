"""The pocket model's chat format: ChatML with Qwen2.5-style tools, once as a template and once as pieces with weights.

vLLM renders the template; pretraining uses the pieces, because only some of the text is to be learned.
`tests/optimizer/test_pretraining.py` holds the two equal, character by character.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

TEMPLATE = r"""
{%- set has_system = messages and messages[0].role == 'system' %}
{%- if has_system or tools %}
    {{- '<|im_start|>system\n' }}
    {{- messages[0].content if has_system else '' }}
    {%- if tools %}
        {{- '\n\n# Tools\n\nEach line is a function you may call.\n<tools>' }}
        {%- for tool in tools %}
            {%- set f = tool.function if tool.function is defined else tool %}
            {{- '\n{"type": "function", "function": {"name": ' ~ (f.name | tojson) ~ ', "description": ' }}
            {{- ((f.description or '') | tojson) ~ ', "parameters": ' ~ ((f.parameters or {}) | tojson) ~ '}}' }}
        {%- endfor %}
        {{- '\n</tools>\n\nTo call one, write:\n<tool_call>\n' }}
        {{- '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>' }}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        {%- set content = (message.content or '') | trim %}
        {{- content }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- set call = tool_call.function if tool_call.function is defined else tool_call %}
            {{- '\n' if content or not loop.first else '' }}
            {{- '<tool_call>\n{"name": ' ~ (call.name | tojson) ~ ', "arguments": ' }}
            {{- call.arguments if call.arguments is string else (call.arguments | tojson) }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
""".lstrip("\n")

# One token each (tokenizer.py), as `TEMPLATE` renders a call of `act`: a changed character needs a new tokenizer, and
# so a new model.
CALL_HEAD = '<tool_call>\n{"name": "act", "arguments": {"command": "'
CALL_TAIL = '"}}\n</tool_call>'


class Piece(NamedTuple):
    """A run of text and the weight of its tokens in the loss; pieces meet only where tokens cannot straddle."""

    text: str
    weight: float


def header(system_prompt: str, tool: dict[str, Any]) -> str:
    """Return the system message with one tool definition, as `TEMPLATE` renders it."""
    function = tool["function"]
    # as the `tojson` of transformers writes it: nothing but JSON's own escapes, while Jinja's filter also escapes <, >
    # and &
    described = ", ".join(
        f'"{key}": {json.dumps(function[key], ensure_ascii=False)}' for key in ("name", "description", "parameters")
    )
    return (
        f"<|im_start|>system\n{system_prompt}\n\n# Tools\n\nEach line is a function you may call.\n<tools>"
        f'\n{{"type": "function", "function": {{{described}}}}}\n</tools>\n\nTo call one, write:\n<tool_call>\n'
        '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
    )


def user(text: str, weight: float) -> list[Piece]:
    return [Piece("<|im_start|>user\n", 0.0), Piece(text, weight), Piece("<|im_end|>\n", 0.0)]


def observation(text: str, weight: float) -> list[Piece]:
    return [
        Piece("<|im_start|>user\n<tool_response>\n", 0.0),
        Piece(text, weight),
        Piece("\n</tool_response><|im_end|>\n", 0.0),
    ]


def action(
    command: str, weight: float, *, says: str = "", cue: str = "", rule: str = "", rule_weight: float = 0.0
) -> list[Piece]:
    """Return an assistant message that states its position and the rule it follows, then acts (`cue -> rule`)."""
    thought = [Piece(f"{says}\n", weight)] if says else []
    thought += [Piece(f"{cue} ->", weight), Piece(f" {rule}", rule_weight), Piece("\n", weight)] if rule else []
    call = [Piece(CALL_HEAD, weight), Piece(command, weight), Piece(CALL_TAIL, weight), Piece("<|im_end|>", weight)]
    return [Piece("<|im_start|>assistant\n", 0.0), *thought, *call, Piece("\n", 0.0)]
