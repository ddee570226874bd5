"""One row of a task file: a task, its split and its grader.

    {"name": "add-1", "split": "practice", "messages": [{"role": "user", "content": "2 + 2?"}],
     "grader": {"type": "numeric", "answer": 4}}

Invariant: unknown keys are errors, so a misspelled one never changes what a task means.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, Field, JsonValue, field_validator, model_validator

from memory.schema import Split
from runtime.engine.client import Message, ToolDefinition
from runtime.environments.graders.machine import Checks
from runtime.environments.graders.registry import AnyGrader
from runtime.environments.machines.machine import MachineSpec
from runtime.environments.sql_database import Table

SEALED = "sealed"
SPLITS = ("practice", "held-out", SEALED)
JSON_TYPES = ("string", "integer", "number", "boolean", "array", "object", "null")
# Percent of the names that get each split; a change moves tasks between the splits of every file that names none.
_DERIVED_SPLITS = (("practice", 60), ("held-out", 90), (SEALED, 100))


class FunctionSpec(BaseModel, extra="forbid"):
    """The function of a tool, in OpenAI's form."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: str = ""
    parameters: dict[str, JsonValue] = {"type": "object", "properties": {}}

    @field_validator("parameters")
    @classmethod
    def _is_a_schema(cls, parameters: dict[str, JsonValue]) -> dict[str, JsonValue]:
        if parameters.get("type") != "object":
            raise ValueError('the parameters of a tool are an object: give them "type": "object"')
        _check_schema(parameters)
        return parameters


def _check_schema(schema: JsonValue) -> None:
    """Raise ValueError if templates and graders could not read a schema.

    Not `jsonschema`'s own check, which takes 5 ms a tool: a file of a thousand tools would delay the start by seconds.
    """
    if not isinstance(schema, dict):
        raise ValueError(f"{schema!r} is no JSON schema: write an object")
    kinds = schema.get("type", "string")
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if kind not in JSON_TYPES:
            raise ValueError(f"{kind!r} is no type of JSON Schema; there is: {', '.join(JSON_TYPES)}")
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, dict):
        raise ValueError(f"properties are an object of schemas by name, not {properties!r}")
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise ValueError(f"required is a list of names, not {required!r}")
    for each in [*properties.values(), *([schema["items"]] if "items" in schema else [])]:
        _check_schema(each)


class ToolSpec(BaseModel, extra="forbid"):
    """A tool that the model may call, in OpenAI's form."""

    type: Literal["function"] = "function"
    function: FunctionSpec


class MessageCallFunction(BaseModel, extra="forbid"):
    """The function of a call: its name, and its arguments as JSON text."""

    name: str
    arguments: str


class MessageCall(BaseModel, extra="forbid"):
    """A call of an assistant's message."""

    id: str = "call-0"
    type: Literal["function"] = "function"
    function: MessageCallFunction


class RowMessage(BaseModel, extra="forbid"):
    """A message in OpenAI's form, its content as text."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    tool_calls: list[MessageCall] | None = None
    tool_call_id: str | None = None

    def to_message(self) -> Message:
        """Return the message as the engine is sent it."""
        return {"content": "", **self.model_dump(exclude_none=True)}


class TaskRow(BaseModel, extra="forbid"):
    """One task, as a line of the file holds it."""

    name: str = Field(pattern=r"^\S{1,128}$")
    """Identifies the task for ever: other content needs another name."""
    split: Literal["practice", "held-out", "sealed"] | None = None
    """None: derived from the name, 60 % practice, 30 % held-out, 10 % sealed."""
    kind: str = Field(default="task", pattern=r"^\S{1,64}$")
    """Lessons carry over between tasks of a kind."""
    messages: list[RowMessage] = Field(min_length=1)
    tools: list[ToolSpec] = []
    """The model's calls of these end the task and are graded; nothing runs them."""
    database: list[Table] | None = None
    """Tables that the model works on with `execute_sql` and `submit_answer`; excludes `tools`."""
    machine: MachineSpec | None = None
    """A Linux that the model works on with `bash`, `answer` and `finish`; excludes `tools` and `database`."""
    grader: AnyGrader
    demonstration: list[RowMessage] | None = None
    """Messages that solve the task; `serve.py tasks check` plays them as a policy's replies and grades the end."""

    @model_validator(mode="after")
    def _fits_together(self) -> TaskRow:
        if self.messages[-1].role not in ("user", "tool"):
            raise ValueError(f"the last message must be a user's or a tool's, not {self.messages[-1].role!r}")
        if any(message.role == "system" for message in self.messages[1:]):
            raise ValueError("a system message must be the first one")
        worlds = [name for name in ("database", "machine") if getattr(self, name) is not None]
        if self.tools and worlds:
            raise ValueError(f"a row with a {worlds[0]} brings its tools: leave `tools` out")
        if len(worlds) > 1:
            raise ValueError("a row has a database or a machine, not both")
        if isinstance(self.grader, Checks) and self.machine is None:
            raise ValueError("the grader 'checks' needs a machine: give the row one")
        names = [tool.function.name for tool in self.tools]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two tools are called {twice!r}: rename one")
        if self.demonstration and self.demonstration[-1].role != "assistant":
            raise ValueError("a demonstration ends with a message of the assistant")
        return self

    @property
    def final_split(self) -> str:
        """One of `SPLITS`: the row's own, or the one that its name gives."""
        return self.split or derive_split(self.name)

    @property
    def opening(self) -> list[Message]:
        return [message.to_message() for message in self.messages]

    @property
    def definitions(self) -> list[ToolDefinition]:
        """The tools in OpenAI's form."""
        return [tool.model_dump() for tool in self.tools]


def derive_split(name: str) -> str:
    """Return the split of a task that names none; the same name always gives the same split."""
    percent = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 100
    return next(split for split, end in _DERIVED_SPLITS if percent < end)


def digest_content(content: Mapping[str, Any]) -> str:
    """Return a digest of what a row's task is: everything but its demonstration, whatever the order of the keys."""
    identity = {key: value for key, value in content.items() if key != "demonstration"}
    text = json.dumps(identity, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def to_split(name: str) -> Split:
    """Return the split of memory's that a row's split is; sealed tasks are held out."""
    return Split.PRACTICE if name == "practice" else Split.HELD_OUT
