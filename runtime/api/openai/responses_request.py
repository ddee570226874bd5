"""Requests of the Responses API, checked field by field and converted to the messages and tools of a chat.

Invariant: a parameter of OpenAI's API that this server does not support is rejected by its name, never ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from memory.schema import new_id
from runtime.api.errors import BadRequest
from runtime.api.openai.chat_request import (
    HARMLESS,
    Extensions,
    check_format,
    check_tool_choice,
    check_tool_results,
    refuse_unsupported,
)
from runtime.api.openai.engine_options import Effort, EngineOptions

# Values that request nothing, of parameters that are rejected with any other value.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "truncation": ("disabled",),
    "top_logprobs": (0,),
}
# Accepted because there is never anything to include: encrypted reasoning, and results of tools that are not offered.
NEUTRAL_INCLUDES = ("reasoning.encrypted_content",)
NEUTRAL_SUFFIXES = (".results", ".outputs", ".sources", ".image_url")
TEXT_PARTS = ("input_text", "output_text", "text")


class TextOptions(BaseModel):
    """`format`: plain text, or JSON by a schema. `verbosity` has no effect here."""

    model_config = ConfigDict(extra="allow")

    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ReasoningOptions(BaseModel, extra="forbid"):
    """`effort` goes to the engine. No summary is made."""

    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class StreamOptions(BaseModel, extra="forbid"):
    """None of OpenAI's options is supported."""

    include_obfuscation: Literal[False] | None = None


class ResponseRequest(EngineOptions):
    """A request of the Responses API, with the agent's extensions in `metadata`, as in a chat completion."""

    model_config = ConfigDict(extra="allow")

    model: str = Field(examples=["agent", "agent@v3"])
    input: str | list[dict[str, Any]] = Field(default_factory=list)
    instructions: str | None = None
    previous_response_id: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    store: bool | None = True
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_output_tokens: int | None = Field(default=None, ge=1)
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: list[str] | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = Field(default=None, description="The person whom the request is made for.")
    user: str | None = Field(default=None, description="The same, under OpenAI's older name.")

    def items(self) -> list[dict[str, Any]]:
        """Return the input as complete items with ids, as they are stored."""
        items = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input
        return [_complete_item(item, position) for position, item in enumerate(items)]

    def chat_tools(self) -> list[dict[str, Any]]:
        """Return the tools in the form of chat completions.

        Raises:
            BadRequest: a built-in tool, or a function without a name.
        """
        return [_as_chat_tool(tool, position) for position, tool in enumerate(self.tools or ())]

    def sampling(self) -> dict[str, Any]:
        """Return the engine's parameters other than temperature and length.

        Raises:
            BadRequest: an invalid format.
        """
        sampling: dict[str, Any] = {"top_p": self.top_p, "response_format": self._response_format()}
        if self.tools:
            sampling |= {"tool_choice": as_chat_choice(self.tool_choice)}
            sampling |= {"parallel_tool_calls": self.parallel_tool_calls}
        sampling |= {"reasoning_effort": self.reasoning and self.reasoning.effort}
        return {name: value for name, value in sampling.items() if value is not None} | self.engine_options()

    def _response_format(self) -> dict[str, Any] | None:
        wanted = self.text.format if self.text is not None else None
        if wanted is None:
            return None
        kind = wanted.get("type")
        rest = {name: value for name, value in wanted.items() if name != "type"}
        try:
            return check_format({"type": kind} | ({"json_schema": rest} if kind == "json_schema" else {}))
        except ValueError as problem:
            raise BadRequest(f"text.format: {problem}", param="text.format", code="invalid_value") from problem


def check_request(request: ResponseRequest, extensions: Extensions) -> None:
    """Check what no single field shows.

    Raises:
        BadRequest: the input is empty, or a parameter is not supported.
    """
    if not request.input and extensions.environment is None:
        raise BadRequest("input is empty: send a text, or at least one item", param="input", code="empty_input")
    refuse_unsupported(request.model_extra or {}, HARMLESS, NEUTRAL)
    for name in request.include or ():
        if name not in NEUTRAL_INCLUDES and not name.endswith(NEUTRAL_SUFFIXES):
            raise BadRequest(f"include={name!r} is not supported here", param="include", code="unsupported_parameter")
    if request.text is not None:
        inside = {f"text.{name}": value for name, value in (request.text.model_extra or {}).items()}
        refuse_unsupported(inside, (), {})
    if extensions.environment is not None and request.tools:
        raise BadRequest("an environment brings its own tools: send none", param="tools", code="unsupported_parameter")
    check_tool_choice(as_chat_choice(request.tool_choice), request.chat_tools())


def check_conversation(messages: list[dict[str, Any]]) -> None:
    """Raise BadRequest unless each function call has its output."""
    try:
        check_tool_results(messages)
    except BadRequest as problem:
        raise BadRequest(str(problem), param="input", code=problem.code) from None


def as_chat_choice(tool_choice: object) -> object:
    """Return a tool choice in the form of chat completions; any other value unchanged, so that `check_tool_choice`
    names it."""
    if isinstance(tool_choice, dict) and tool_choice.get("type") == "function" and "name" in tool_choice:
        return {"type": "function", "function": {"name": tool_choice["name"]}}
    return tool_choice


def as_messages(items: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return items as messages of a chat; an answer's text and the function calls after it become one message."""
    messages: list[dict[str, Any]] = []
    for item in items:
        if item["type"] == "message":
            role = "system" if item["role"] == "developer" else item["role"]
            messages.append({"role": role, "content": "".join(part["text"] for part in item["content"])})
        elif item["type"] == "function_call":
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            function = {"name": item["name"], "arguments": item["arguments"]}
            call = {"id": item["call_id"], "type": "function", "function": function}
            # Text and calls in one message, as the reply was recorded: otherwise the digest in runtime/agent/resume.py
            # differs and the episode is not continued.
            messages[-1].setdefault("tool_calls", []).append(call)
        else:
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]})
    return messages


def _complete_item(item: Mapping[str, Any], position: int) -> dict[str, Any]:
    """Return an item with the defaults of all optional parts."""
    kind = item.get("type", "message" if "role" in item else None)
    if kind == "message":
        return _complete_message(item, position)
    if kind == "function_call":
        _require_texts(item, ("call_id", "name", "arguments"), position)
        fields = {name: item[name] for name in ("call_id", "name", "arguments")}
        return {"id": item.get("id") or new_id("fc"), "type": kind, "status": "completed", **fields}
    if kind == "function_call_output":
        output = item.get("output")
        if isinstance(output, list):
            output = "".join(_text_of(part, position) for part in output)
        _require_texts({**item, "output": output}, ("call_id", "output"), position)
        fields = {"call_id": item["call_id"], "output": output}
        return {"id": item.get("id") or new_id("fco"), "type": kind, "status": "completed", **fields}
    raise BadRequest(
        f"items of type {kind!r} are not supported; there is: message, function_call, function_call_output",
        param=f"input[{position}].type",
        code="unsupported_parameter",
    )


def _complete_message(item: Mapping[str, Any], position: int) -> dict[str, Any]:
    role, content = item.get("role"), item.get("content")
    if role not in ("system", "developer", "user", "assistant"):
        raise BadRequest(
            f"a message is of system, developer, user or assistant, not of {role!r}",
            param=f"input[{position}].role",
            code="invalid_value",
        )
    if not isinstance(content, str | list):
        raise BadRequest(
            f"content is a text or a list of parts, not {content!r}",
            param=f"input[{position}].content",
            code="invalid_value",
        )
    parts = [content] if isinstance(content, str) else [_text_of(part, position) for part in content]
    kind = "output_text" if role == "assistant" else "input_text"
    extra = {"annotations": []} if role == "assistant" else {}
    return {
        "id": item.get("id") or new_id("msg"),
        "type": "message",
        "role": role,
        "status": "completed",
        "content": [{"type": kind, "text": text, **extra} for text in parts],
    }


def _text_of(part: object, position: int) -> str:
    kind, text = type(part).__name__, None
    if isinstance(part, dict):
        kind, text = part.get("type"), part.get("text")
    if kind not in TEXT_PARTS or not isinstance(text, str):
        raise BadRequest(
            f"only text is understood, not {kind!r}", param=f"input[{position}].content", code="unsupported_parameter"
        )
    return text


def _require_texts(item: Mapping[str, Any], names: Iterable[str], position: int) -> None:
    for name in names:
        if not isinstance(item.get(name), str):
            raise BadRequest(
                f"a {item.get('type')} needs {name!r}, a text", param=f"input[{position}].{name}", code="invalid_value"
            )


def _as_chat_tool(tool: Mapping[str, Any], position: int) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise BadRequest(
            f"tools of type {tool.get('type')!r} are not supported, functions are",
            param=f"tools[{position}].type",
            code="unsupported_tool",
        )
    if not isinstance(tool.get("name"), str) or not tool["name"]:
        raise BadRequest(
            'a tool is {"type": "function", "name", "description", "parameters"}',
            param=f"tools[{position}].name",
            code="invalid_value",
        )
    known = ("name", "description", "parameters", "strict")
    refuse_unsupported({name: value for name, value in tool.items() if name not in ("type", *known)}, (), {})
    return {"type": "function", "function": {name: tool[name] for name in known if tool.get(name) is not None}}
