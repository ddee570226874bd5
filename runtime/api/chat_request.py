"""Chat completions as clients ask for them, checked field by field, with this server's extensions in `metadata`.

Refuses to know how an answer is made.
Invariant: what OpenAI's API has and this server does not is refused by its name, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from memory.schema import Split
from runtime.api.errors import BadRequest

# Parameters without meaning here that clients send all the same.
HARMLESS = frozenset({"user", "store", "safety_identifier", "prompt_cache_key", "service_tier", "parallel_tool_calls"})
# Values that ask for nothing, under names that are refused otherwise.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {"n": (1, None), "logprobs": (False, None), "top_logprobs": (0, None)}
# Handed to the engine as they are.
SAMPLING = ("top_p", "stop", "frequency_penalty", "presence_penalty", "response_format", "tool_choice")


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
    def _join_text_parts(cls, content: Any) -> Any:
        if not isinstance(content, list):
            return content
        for part in content:
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ValueError(f"only text parts are understood, not {part.get('type')!r}")
        return "".join(part["text"] for part in content)

    def plain(self) -> dict[str, Any]:
        """Return the message as the model's template wants it."""
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role}
        message["content"] = self.content if self.content is not None else ""
        for name in ("tool_calls", "tool_call_id", "name"):
            value = getattr(self, name)
            if value is not None:
                message[name] = value
        return message


class StreamOptions(BaseModel):
    """`include_usage`: a last chunk with the token counts."""

    include_usage: bool = False


class ChatRequest(BaseModel):
    """A chat completion request, with the agent's extensions in `metadata` (all values are strings):

    * `environment`, `task`: play that task on the server; `messages` may be empty then.
    * `use_memory`: `on` (default) or `off`.
    * `split`: what the task must be; a guard against learning from what measures.
    * `seed`: like `seed`, for clients that cannot send that.
    * `episode_id`: groups calls that belong together.
    """

    model_config = ConfigDict(extra="allow")

    model: str = Field(examples=["agent", "agent@v3"])
    messages: list[Message] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    tools: list[dict[str, Any]] | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    stop: str | list[str] | None = None
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    response_format: dict[str, Any] | None = None
    tool_choice: str | dict[str, Any] | None = Field(default=None, description="Only with `tools` of the request.")
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    metadata: dict[str, str] | None = None

    @field_validator("tools")
    @classmethod
    def _are_functions(cls, tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        for tool in tools or []:
            function = tool.get("function")
            if tool.get("type") != "function" or not isinstance(function, dict) or not function.get("name"):
                raise ValueError('a tool is {"type": "function", "function": {"name", "description", "parameters"}}')
        return tools or None

    def sampling(self) -> dict[str, Any]:
        """Return what the engine is told beyond temperature, seed and length."""
        given = {name: getattr(self, name) for name in SAMPLING}
        return {name: value for name, value in given.items() if value is not None}


EXAMPLES = {
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


@dataclass(frozen=True)
class Extensions:
    """What `metadata` asks of this server. Keys it doesn't know belong to the client."""

    environment: str | None = None
    task: str | None = None
    split: Split | None = None
    use_memory: bool = True
    seed: int | None = None
    episode_id: str | None = None


def read_extensions(metadata: Mapping[str, str] | None) -> Extensions:
    """Return what `metadata` asks for.

    Raises:
        BadRequest: a value that cannot be, or an environment without a task or the reverse.
    """
    given = dict(metadata or {})
    if ("environment" in given) != ("task" in given):
        missing = "task" if "environment" in given else "environment"
        raise BadRequest(f"metadata.{missing} is missing: a task is named by both", param=f"metadata.{missing}")
    memory = _one_of("use_memory", given.get("use_memory", "on"), {"on": True, "off": False})
    split = _one_of("split", given["split"], {split.value: split for split in Split}) if "split" in given else None
    seed = given.get("seed")
    if seed is not None and not seed.removeprefix("-").isdecimal():
        raise BadRequest(f"metadata.seed must be a whole number, not {seed!r}", param="metadata.seed")
    return Extensions(
        environment=given.get("environment"),
        task=given.get("task"),
        split=split,
        use_memory=memory,
        seed=None if seed is None else int(seed),
        episode_id=given.get("episode_id"),
    )


def _one_of(name: str, value: str, choices: Mapping[str, Any]) -> Any:
    if value not in choices:
        known = " or ".join(repr(choice) for choice in choices)
        raise BadRequest(f"metadata.{name} must be {known}, not {value!r}", param=f"metadata.{name}")
    return choices[value]


def check_request(request: ChatRequest, extensions: Extensions) -> None:
    """Refuse by name what cannot be done.

    Raises:
        BadRequest: no messages outside an environment, or a parameter that isn't supported.
    """
    if not request.messages and extensions.environment is None:
        raise BadRequest("messages is empty: send at least one message", param="messages", code="empty_messages")
    for name, value in (request.model_extra or {}).items():
        if name not in HARMLESS and value not in NEUTRAL.get(name, ()):
            raise BadRequest(f"{name}={value!r} is not supported here", param=name, code="unsupported_parameter")
    if extensions.environment is not None and request.tools:
        raise BadRequest("an environment brings its own tools: send none", param="tools", code="unsupported_parameter")
    if request.tool_choice not in (None, "auto") and not request.tools:
        raise BadRequest("tool_choice needs tools in the request", param="tool_choice", code="unsupported_parameter")
