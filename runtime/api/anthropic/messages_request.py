"""Requests of Anthropic's Messages API, checked block by block and converted to a `ChatRequest`.

Invariant: a parameter or a kind of block that this server does not support is rejected by its name, never ignored.
Hazard: one conversation must always become the same messages, or the digest in runtime/agent/resume.py differs and its
episode is not continued.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Annotated, Any, Literal, NoReturn

from fastapi.openapi.models import Example
from pydantic import BaseModel, ConfigDict, FailFast, Field

from memory.schema import dump_json
from runtime.api.errors import BadRequest
from runtime.api.openai.chat_request import ChatRequest, Extensions, read_extensions, refuse_unsupported
from runtime.api.openai.engine_options import EngineOptions

Json = dict[str, Any]

# Parameters that have no effect here, which clients send anyway.
HARMLESS = frozenset({"service_tier", "cache_control"})
HARMLESS_IN_TOOLS = frozenset({"cache_control", "eager_input_streaming"})
# Values that request nothing, of parameters that are rejected with any other value.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {"speed": ("standard",), "mcp_servers": ([],)}
NEUTRAL_IN_TOOLS: Mapping[str, tuple[Any, ...]] = {"allowed_callers": (["direct"],), "input_examples": ([],)}
# "adaptive" lets the model decide, also against thinking.
NEUTRAL_THINKING = ("disabled", "adaptive")
TOOL_FIELDS = frozenset({"type", "name", "description", "input_schema", "strict"})
THINKING_BLOCKS = ("thinking", "redacted_thinking")
"""Dropped: this server sends none, and the models read none of another server's."""
TEXT_SEPARATOR = "\n"
"""Between the blocks of one message: clients send paragraphs as blocks, without white space around them."""
UNPARSED = "INVALID_JSON"
"""Anthropic's key for arguments of a call that are no JSON object: `input` has to be one."""


class InputMessage(BaseModel):
    """One message; `content` is a text or a list of blocks."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Json]


class JsonFormat(BaseModel, extra="forbid"):
    """The schema that an answer has to satisfy."""

    type: Literal["json_schema"]
    json_schema: Json = Field(alias="schema")


class OutputConfig(BaseModel, extra="forbid"):
    """`effort` goes to the engine; `format` is enforced by it."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonFormat | None = None


class ToolChoice(BaseModel, extra="forbid"):
    """Whether and which tool the model has to call."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    def as_chat_choice(self) -> str | Json:
        """Return the choice in OpenAI's form."""
        if self.type == "tool":
            return {"type": "function", "function": {"name": self.name}}
        return {"auto": "auto", "any": "required", "none": "none"}[self.type]


class TokenCountRequest(BaseModel):
    """A request to count the tokens of a conversation."""

    model_config = ConfigDict(extra="allow")

    model: str = Field(examples=["agent", "agent@v3"])
    # FailFast: otherwise pydantic describes each invalid message of a large body.
    messages: Annotated[list[InputMessage], FailFast()] = Field(default_factory=list)
    system: str | list[Json] | None = None
    tools: list[Json] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Json | None = Field(default=None, description='Only {"type": "disabled"} and {"type": "adaptive"}.')
    output_config: OutputConfig | None = None

    def chat_messages(self) -> list[Json]:
        """Return the conversation as messages of a chat. Raises: BadRequest."""
        return as_chat_messages(self.system, self.messages)

    def chat_tools(self) -> list[Json]:
        """Return the tools in OpenAI's form. Raises: BadRequest."""
        return [_as_chat_tool(tool, position) for position, tool in enumerate(self.tools or ())]


class MessagesRequest(TokenCountRequest, EngineOptions):
    """A request of the Messages API. The person is `metadata.user_id`; the agent's other extensions are in `metadata`
    too, as in a chat completion."""

    model_config = ConfigDict(extra="allow")

    max_tokens: int = Field(ge=1)
    stream: bool | None = False
    stop_sequences: list[str] | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    metadata: dict[str, str | None] | None = None

    def extensions(self) -> Extensions:
        """Return the extensions in `metadata`, and the person. Raises: BadRequest."""
        given = {name: value for name, value in (self.metadata or {}).items() if value is not None}
        user_id = given.pop("user_id", None)
        return read_extensions(given, user_id=user_id)

    def as_chat_request(self) -> ChatRequest:
        """Return the same request in the form of chat completions. Raises: BadRequest."""
        choice, config = self.tool_choice, self.output_config or OutputConfig()
        form = config.format
        schema = {"name": "output", "schema": form.json_schema, "strict": True} if form is not None else None
        is_single = choice is not None and choice.disable_parallel_tool_use
        return ChatRequest.model_validate(
            {
                "model": self.model,
                "messages": self.chat_messages(),
                "tools": self.chat_tools() or None,
                "tool_choice": choice.as_chat_choice() if choice is not None else None,
                "parallel_tool_calls": False if is_single else None,
                "max_tokens": self.max_tokens,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "stop": self.stop_sequences or None,
                "response_format": {"type": "json_schema", "json_schema": schema} if schema is not None else None,
                "reasoning_effort": config.effort,
                **self.engine_options(),
            }
        )


EXAMPLES: dict[str, Example] = {
    "a question": {
        "summary": "Ask the active policy",
        "value": {
            "model": "agent",
            "max_tokens": 1024,
            "messages": [{"role": "user", "content": "When is invoice 4711 due?"}],
            "metadata": {"user_id": "jane"},
        },
    },
}


def check_parameters(request: TokenCountRequest) -> None:
    """Raise BadRequest for a parameter that is not supported, and for a conversation that ends in a reply."""
    extra = request.model_extra or {}
    if extra.get("thread") is not None:
        # With this code the official client sends the request again, whole: its tool runner always tries threads first.
        raise BadRequest(
            "thread is not supported: send the whole conversation without it", code="thread_unsupported_request"
        )
    refuse_unsupported(extra, HARMLESS, NEUTRAL)
    if request.thinking is not None and request.thinking.get("type") not in NEUTRAL_THINKING:
        raise BadRequest(
            f"thinking of type {request.thinking.get('type')!r} is not supported: leave it out, or send "
            '{"type": "disabled"}',
            code="unsupported_parameter",
        )
    if request.messages and request.messages[-1].role == "assistant":
        raise BadRequest(
            "messages ends with a reply of the assistant, which cannot be continued (prefilled) here: end with a "
            "message of the user",
            code="unsupported_parameter",
        )


def as_chat_messages(system: str | Sequence[Json] | None, messages: Sequence[InputMessage]) -> list[Json]:
    """Return a conversation as messages of a chat. Raises: BadRequest."""
    chat: list[Json] = []
    if text := _text_of(system or "", "system"):
        chat.append({"role": "system", "content": text})
    for role, neighbours in itertools.groupby(_convert_all(messages), key=itemgetter("role")):
        run = list(neighbours)
        # like Anthropic's API: neighbours of the user, or of the assistant, are one message
        chat += [_join_messages(role, run)] if role in ("user", "assistant") else run
    return chat


def _convert_all(messages: Sequence[InputMessage]) -> Iterator[Json]:
    for position, message in enumerate(messages):
        convert = _convert_reply if message.role == "assistant" else _convert_input
        yield from convert(message, f"messages.{position}.content")


def _join_messages(role: str, run: Sequence[Json]) -> Json:
    # all at once: to join them one by one takes time that grows with the square of their number
    joined: Json = {"role": role, "content": _join(message["content"] for message in run)}
    if calls := [call for message in run for call in message.get("tool_calls", ())]:
        joined["tool_calls"] = calls
    return joined


def _convert_input(message: InputMessage, path: str) -> Iterator[Json]:
    """Yield the user's texts and the results of tools, in their order."""
    texts: list[str] = []
    num_results = 0
    for index, block in enumerate(_blocks_of(message.content)):
        if block.get("type") == "tool_result" and message.role == "user":
            if texts:
                yield {"role": "user", "content": _join(texts)}
                texts = []
            num_results += 1
            yield _convert_result(block, f"{path}.{index}")
        else:
            texts.append(_read_text(block, f"{path}.{index}", message.role))
    if texts or not num_results:
        yield {"role": message.role, "content": _join(texts)}


def _convert_result(block: Json, path: str) -> Json:
    call_id = block.get("tool_use_id")
    if not isinstance(call_id, str) or not call_id:
        _refuse(f"{path}: a tool_result needs tool_use_id: which call is it the result of?")
    content = block.get("content") or ""
    if not isinstance(content, str | list):
        _refuse(f"{path}.content: it is a text or a list of blocks, not {type(content).__name__}")
    text = _text_of(content, f"{path}.content")
    # As `failed_call` in runtime/tools/base.py shows the errors of this server's own tools.
    return {"role": "tool", "tool_call_id": call_id, "content": f"Error: {text}" if block.get("is_error") else text}


def _convert_reply(message: InputMessage, path: str) -> Iterator[Json]:
    """Yield the assistant's texts and tool calls as one message."""
    texts: list[str] = []
    calls: list[Json] = []
    for index, block in enumerate(_blocks_of(message.content)):
        if block.get("type") == "tool_use":
            calls.append(_convert_call(block, f"{path}.{index}"))
        elif block.get("type") not in THINKING_BLOCKS:
            texts.append(_read_text(block, f"{path}.{index}", message.role))
    yield {"role": "assistant", "content": _join(texts)} | ({"tool_calls": calls} if calls else {})


def _convert_call(block: Json, path: str) -> Json:
    call_id, name, given = block.get("id"), block.get("name"), block.get("input") or {}
    if not isinstance(call_id, str) or not isinstance(name, str) or not call_id or not isinstance(given, dict):
        _refuse(f'{path}: a tool_use is {{"type": "tool_use", "id", "name", "input"}} with an object as its input')
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": write_arguments(given)}}


def read_input(arguments: str) -> Json:
    """Return the arguments of a call, which a model wrote, as the `input` of a tool_use. `write_arguments` is its
    inverse."""
    try:
        given = json.loads(arguments or "{}", parse_constant=_reject_number, parse_float=_read_float)
    except (ValueError, RecursionError):
        return {UNPARSED: arguments}
    return given if isinstance(given, dict) else {UNPARSED: arguments}


def write_arguments(given: Json) -> str:
    """Return the `input` of a tool_use as the JSON text of arguments."""
    unparsed = given.get(UNPARSED)
    return unparsed if len(given) == 1 and isinstance(unparsed, str) else dump_json(given)


def _reject_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _read_float(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _reject_number(text)


def _blocks_of(content: str | Sequence[Json]) -> Sequence[Json]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _text_of(content: str | Sequence[Json], path: str) -> str:
    """Return the text of a content in which there can be nothing else."""
    return _join(_read_text(block, f"{path}.{index}") for index, block in enumerate(_blocks_of(content)))


def _read_text(block: object, path: str, role: str | None = None) -> str:
    kind = block.get("type") if isinstance(block, dict) else type(block).__name__
    text = block.get("text") if isinstance(block, dict) else None
    if kind == "text" and isinstance(text, str):
        return text
    where = f"in a message of the {role}" if role is not None else "here"
    supported = {"user": "text, tool_result", "assistant": "text, tool_use"}.get(role or "", "text")
    _refuse(f"{path}: a block of type {kind!r} is not supported {where}; there is: {supported}")


def _join(texts: Iterable[str]) -> str:
    return TEXT_SEPARATOR.join(text for text in texts if text)


def _as_chat_tool(tool: Json, position: int) -> Json:
    kind, name, schema = tool.get("type"), tool.get("name"), tool.get("input_schema")
    if kind not in (None, "custom"):
        _refuse(
            f"tools.{position}: tools of type {kind!r} are not supported, tools of your own are: "
            '{"name", "description", "input_schema"}',
            code="unsupported_tool",
        )
    if not isinstance(name, str) or not name or not isinstance(schema, dict):
        _refuse(f'tools.{position}: a tool is {{"name", "description", "input_schema"}} with an object as its schema')
    extra = {f"tools.{position}.{field}": value for field, value in tool.items() if field not in TOOL_FIELDS}
    prefix = f"tools.{position}."
    refuse_unsupported(
        extra,
        {prefix + field for field in HARMLESS_IN_TOOLS},
        {prefix + field: values for field, values in NEUTRAL_IN_TOOLS.items()},
    )
    function = {"name": name, "description": tool.get("description"), "parameters": schema}
    function |= {"strict": True} if tool.get("strict") else {}
    return {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}


def _refuse(message: str, *, code: str = "invalid_value") -> NoReturn:
    raise BadRequest(message, code=code)
