"""Requests of OpenAI's chat completions, checked field by field, with this server's extensions in `metadata`.

Invariant: a parameter of OpenAI's API that this server does not support is rejected by its name, never ignored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, TypeVar

from fastapi.openapi.models import Example
from pydantic import BaseModel, ConfigDict, FailFast, Field, field_validator, model_validator

from memory.schema import Split, clean
from runtime.api.errors import BadRequest
from runtime.api.openai.engine_options import Effort, EngineOptions

# Parameters that have no effect here, which clients send anyway.
HARMLESS = frozenset({"store", "prompt_cache_key", "prompt_cache_retention", "service_tier", "verbosity"})
MAX_PERSON_CHARS = 512
MAX_EPISODE_ID_CHARS = 512
# Values that request nothing, of parameters that are rejected with any other value.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {"n": (1,), "modalities": (["text"],)}
# Passed to the engine unchanged.
SAMPLING = (
    *("top_p", "stop", "frequency_penalty", "presence_penalty", "response_format", "logprobs", "top_logprobs"),
    "reasoning_effort",
)
# Passed on only with tools: vLLM rejects them without.
TOOL_OPTIONS = ("tool_choice", "parallel_tool_calls")
REPLACEMENTS = {
    "functions": "; send tools instead",
    "function_call": "; send tool_choice instead",
}


class Message(BaseModel):
    """One message. Content may be a text or a list of text parts."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    name: str | None = None

    @field_validator("content")
    @classmethod
    def _join_text_parts(cls, content: str | list[dict[str, Any]] | None) -> str | None:
        if not isinstance(content, list):
            return content
        for part in content:
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ValueError(f"only text parts are understood, not {part.get('type')!r}")
        # As `text_of` in memory/conversation.py joins them, or the digest of a continued episode differs.
        return "".join(part["text"] for part in content)

    @model_validator(mode="after")
    def _require_supported(self) -> Self:
        for name in ("function_call", "audio"):
            if (self.model_extra or {}).get(name) is not None:
                raise ValueError(f"{name} is not supported in a message")
        if self.role == "tool" and not self.tool_call_id:
            raise ValueError("a tool message needs tool_call_id: which call is it the result of?")
        for call in self.tool_calls or []:
            function = call.get("function")
            texts = (call.get("id"), function.get("name")) if isinstance(function, dict) else (None,)
            if not texts[0] or not all(isinstance(text, str) for text in texts):
                raise ValueError('a tool call is {"id", "type": "function", "function": {"name", "arguments"}}')
        return self

    def plain(self) -> dict[str, Any]:
        """Return the message in the form that chat templates read."""
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role}
        # Never None, which a chat template may write as the word "None".
        message["content"] = self.content if self.content is not None else ""
        for name in ("tool_calls", "tool_call_id", "name"):
            value = getattr(self, name)
            if value is not None:
                message[name] = value
        return message


class StreamOptions(BaseModel, extra="forbid"):
    """`include_usage`: a last chunk with the token counts."""

    include_usage: bool | None = False
    include_obfuscation: Literal[False] | None = None


def check_format(response_format: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the format, or None if it is plain text. Raises ValueError for an invalid one."""
    if response_format is None:
        return None
    kind = response_format.get("type")
    if kind not in ("text", "json_object", "json_schema"):
        raise ValueError(f"type is 'text', 'json_object' or 'json_schema', not {kind!r}")
    if kind == "json_schema":
        schema = response_format.get("json_schema")
        if not isinstance(schema, dict) or not schema.get("name") or not isinstance(schema.get("schema"), dict):
            raise ValueError('a json_schema is {"name", "schema", "strict"}')
    return None if kind == "text" else response_format


class ChatRequest(EngineOptions):
    """A chat completion request. FastAPI makes it from the body, and the route makes a `TurnRequest` of it.

    The agent's extensions are in `metadata` (all values are strings):

    * `environment`, `task`: play that task on the server; `messages` may be empty then.
    * `use_memory`: `on` or `off`; by default as the policy serves.
    * `task` without an environment: the client's own name of the task that this conversation attempts. Attempts at one
      task are compared with each other.
    * `split`: whether the task may teach (`live`, `practice`) or only measures (`held-out`). A task of an environment
      has one already; then this must be the same.
    * `seed`: like `seed`, for clients that cannot send that.
    * `episode_id`: names the episode, at most one request of which is answered at a time.
    * `user`: the person whom the request is made for, if neither `safety_identifier` nor `user` is given. Memories of
      the conversation are shown only to that person, and to nobody if no person is named.
    * `share`: `true` for a client that serves no persons: memories of the conversation are shown to the whole tenant,
      and no person's memories are shown in it. The default is `false`.
    * `untrusted_tools`: names of the client's own tools, with commas between them, that return what other people wrote.
      Nothing is learned from an episode that read such a result until an operator approves it.
    """

    model_config = ConfigDict(extra="allow")

    model: str = Field(examples=["agent", "agent@v3"])
    # FailFast: otherwise pydantic describes each invalid message of a large body.
    messages: Annotated[list[Message], FailFast()] = Field(default_factory=list)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    tools: list[dict[str, Any]] | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    stop: str | list[str] | None = None
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    response_format: dict[str, Any] | None = None
    reasoning_effort: Effort | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    parallel_tool_calls: bool | None = None
    tool_choice: str | dict[str, Any] | None = Field(default=None, description="Only with `tools` of the request.")
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = Field(default=None, description="The person whom the request is made for.")
    user: str | None = Field(default=None, description="The same, under OpenAI's older name.")

    @field_validator("tools")
    @classmethod
    def _check_functions(cls, tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        for tool in tools or []:
            function = tool.get("function")
            if tool.get("type", "function") != "function":
                raise ValueError(f"tools of type {tool['type']!r} are not supported, functions are")
            if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
                raise ValueError('a tool is {"type": "function", "function": {"name", "description", "parameters"}}')
        return tools or None

    def sampling(self) -> dict[str, Any]:
        """Return the engine's parameters other than temperature, seed and length."""
        names = SAMPLING + TOOL_OPTIONS if self.tools else SAMPLING
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None} | self.engine_options()

    @field_validator("response_format")
    @classmethod
    def _check_format(cls, response_format: dict[str, Any] | None) -> dict[str, Any] | None:
        return check_format(response_format)


EXAMPLES: dict[str, Example] = {
    "a question": {
        "summary": "Ask the active policy",
        "value": {"model": "agent", "messages": [{"role": "user", "content": "When is invoice 4711 due?"}]},
    },
    "a task": {
        "summary": "Play a task of an environment, as policy v3, without memory",
        "value": {
            "model": "agent@v3",
            "messages": [{"role": "user", "content": "play"}],
            "metadata": {"environment": "textworld", "task": "900000", "use_memory": "off"},
        },
    },
}


Choice = TypeVar("Choice")

MEMORY_SWITCH = {"on": True, "off": False}


@dataclass(frozen=True)
class Extensions:
    """The keys of `metadata` that this server reads. `read_extensions` makes it; all other keys are the client's
    own."""

    environment: str | None = None
    task: str | None = None
    split: Split | None = None
    use_memory: bool | None = None
    """None: as the policy serves."""
    seed: int | None = None
    episode_id: str | None = None
    user_id: str = ""
    """The person whom the request is made for; empty: not named."""
    is_shared: bool = False
    untrusted_tools: frozenset[str] = frozenset()
    """Names of the client's tools whose results other people may have written."""


def read_extensions(
    metadata: Mapping[str, str] | None,
    *,
    safety_identifier: str | None = None,
    user: str | None = None,
    user_id: str | None = None,
) -> Extensions:
    """Return the extensions in `metadata`, and the person. `user_id` is the person's field in Anthropic's metadata.

    Raises:
        BadRequest: an invalid value, or an environment or a split without a task.
    """
    fields = dict(metadata or {})
    named = {
        "safety_identifier": safety_identifier,
        "user": user,
        "metadata.user_id": user_id,
        "metadata.user": fields.get("user"),
    }
    for name in ("environment", "split"):
        if name in fields and not fields.get("task"):
            raise BadRequest(f"metadata.task is missing: metadata.{name} is a task's", param="metadata.task")
    memory = _one_of("use_memory", fields["use_memory"], MEMORY_SWITCH) if "use_memory" in fields else None
    split = _one_of("split", fields["split"], {split.value: split for split in Split}) if "split" in fields else None
    if "episode_id" in fields:
        check_episode_id(fields["episode_id"])
    seed = fields.get("seed")
    if seed is not None and not seed.removeprefix("-").isdecimal():
        raise BadRequest(f"metadata.seed must be a whole number, not {seed!r}", param="metadata.seed")
    return Extensions(
        environment=fields.get("environment"),
        task=fields.get("task"),
        split=split,
        use_memory=memory,
        seed=None if seed is None else int(seed),
        episode_id=fields.get("episode_id"),
        user_id=next((check_person(name, value) for name, value in named.items() if value and value.strip()), ""),
        is_shared=_one_of("share", fields.get("share", "false"), {"true": True, "false": False}),
        untrusted_tools=frozenset(filter(None, map(str.strip, fields.get("untrusted_tools", "").split(",")))),
    )


def check_episode_id(episode_id: str) -> None:
    """Raise BadRequest for an id that the header `X-Episode-Id` cannot hold: an episode must not fail after it was
    played."""
    # Starlette encodes headers as ISO 8859-1 and raises for anything else.
    is_latin = episode_id.isprintable() and max(episode_id, default="") <= "\xff"
    if not is_latin or episode_id.strip() != episode_id or len(episode_id) > MAX_EPISODE_ID_CHARS:
        raise BadRequest(
            f"metadata.episode_id is up to {MAX_EPISODE_ID_CHARS} printable characters of ISO 8859-1 with no space "
            f"around them, not {episode_id[:80]!r}",
            param="metadata.episode_id",
            code="invalid_value",
        )


def check_person(name: str, value: str) -> str:
    """Return a person's name. Raises BadRequest for one that the database could store only shortened or cleaned,
    because two such names could become equal."""
    if len(value) > MAX_PERSON_CHARS or clean(value) != value:
        raise BadRequest(
            f"{name} must be at most {MAX_PERSON_CHARS} characters of well-formed text, not {value[:80]!r}",
            param=name,
            code="invalid_value",
        )
    return value


def _one_of(name: str, value: str, choices: Mapping[str, Choice]) -> Choice:
    if value not in choices:
        known = " or ".join(repr(choice) for choice in choices)
        raise BadRequest(f"metadata.{name} must be {known}, not {value!r}", param=f"metadata.{name}")
    return choices[value]


def check_request(request: ChatRequest, extensions: Extensions) -> None:
    """Check what no single field shows.

    Raises:
        BadRequest: there are no messages and no environment, or a parameter is not supported.
    """
    if not request.messages and extensions.environment is None:
        raise BadRequest("messages is empty: send at least one message", param="messages", code="empty_messages")
    refuse_unsupported(request.model_extra or {}, HARMLESS, NEUTRAL)
    if extensions.environment is not None and request.tools:
        raise BadRequest("an environment brings its own tools: send none", param="tools", code="unsupported_parameter")
    if request.stream_options is not None and not request.stream:
        raise BadRequest("stream_options needs stream=True", param="stream_options", code="invalid_value")
    if request.top_logprobs and not request.logprobs:
        raise BadRequest("top_logprobs needs logprobs=True", param="top_logprobs", code="invalid_value")
    check_tool_choice(request.tool_choice, request.tools or ())
    check_tool_results([message.plain() for message in request.messages])


def refuse_unsupported(
    extra: Mapping[str, Any], harmless: Collection[str], neutral: Mapping[str, tuple[Any, ...]]
) -> None:
    """Raise BadRequest for the first unknown parameter whose value requests something."""
    for name, value in extra.items():
        # Official clients send explicit nulls and defaults, so `extra="forbid"` would reject sound requests.
        is_neutral = value is None or value is False or value in neutral.get(name, ())
        if name not in harmless and not is_neutral and not _is_empty(value):
            replacement = REPLACEMENTS.get(name, "")
            field = f"{name[:80]}={repr(value)[:200]}"
            raise BadRequest(
                f"{field} is not supported here{replacement}", param=name[:80], code="unsupported_parameter"
            )


def _is_empty(value: object) -> bool:
    return isinstance(value, dict) and all(inside is None for inside in value.values())


def check_tool_choice(tool_choice: object, tools: Sequence[Mapping[str, Any]]) -> None:
    """Raise BadRequest for an invalid choice, or one of a tool that the request does not contain."""
    if tool_choice in (None, "auto", "none"):
        return
    if not tools:
        raise BadRequest("tool_choice needs tools in the request", param="tool_choice", code="unsupported_parameter")
    if tool_choice == "required":
        return
    choice = tool_choice if isinstance(tool_choice, dict) else {}
    function = choice.get("function")
    if not isinstance(function, dict) or choice.get("type") != "function":
        raise BadRequest(
            f"tool_choice={tool_choice!r} is not supported: it is 'none', 'auto', 'required' or names one function",
            param="tool_choice",
            code="unsupported_parameter",
        )
    names = [tool["function"]["name"] for tool in tools]
    if function.get("name") not in names:
        known = ", ".join(map(repr, names))
        raise BadRequest(
            f"tool_choice names {function.get('name')!r}; the tools sent are: {known}",
            param="tool_choice",
            code="invalid_value",
        )


def check_tool_results(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raise BadRequest unless results follow each reply with tool calls, exactly one for each call."""
    missing: Counter[str] = Counter()  # a list would take quadratic time for many results
    for position, message in enumerate(messages):
        if message["role"] == "tool":
            if not missing[message["tool_call_id"]]:
                raise BadRequest(
                    f"the result of {message['tool_call_id']!r} answers no open tool call: send the reply that made it "
                    "right before",
                    param=f"messages[{position}].tool_call_id",
                    code="invalid_value",
                )
            missing[message["tool_call_id"]] -= 1
            continue
        _require_no_missing(missing, position)
        # A Counter, because a model may give two calls of one reply the same id.
        missing = Counter(call["id"] for call in message.get("tool_calls") or ())
    _require_no_missing(missing, len(messages))


def _require_no_missing(missing: Counter[str], position: int) -> None:
    unanswered = next((call_id for call_id, num_open in missing.items() if num_open), None)
    if unanswered is not None:
        raise BadRequest(
            f"the tool call {unanswered!r} has no result: send it right after the reply that made the call",
            param=f"messages[{position}]",
            code="invalid_value",
        )
