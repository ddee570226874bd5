"""The grader of function calls, by the rules of the Berkeley Function-Calling Leaderboard (BFCL).

The reply must make exactly the expected calls, in any order. Of each: the name; all required arguments and none that is
not expected; values of the declared types, one of the allowed values each. An allowed value "" marks an argument that
may be left out. Strings are compared without case, spaces and the characters `,./-_*^`; an integer counts as a number.
Source: Patil et al., "The Berkeley Function Calling Leaderboard" (ICML 2025), and its checker, with which this agrees
on its own data (`python -m tests.bench.bfcl_agreement`).

Hazard: three rules are the leaderboard's and surprise. Expected calls take the first call that fits, without going
back. Values inside of objects have no type check, so `true` passes for 1 there. An argument whose allowed values have
another type than the declared one takes both types.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import JsonValue

from runtime.engine.client import ToolDefinition
from runtime.environments.base import Outcome
from runtime.environments.graders.base import Call, Grader, GradingResources, Submission, quote, right, wrong

TYPES: Mapping[str, type] = {
    "string": str,
    "integer": int,
    "number": float,
    "boolean": bool,
    "array": list,
    "object": dict,
}
OPTIONAL = ""
"""Among the allowed values: the argument may be left out."""
_IGNORED = re.compile(r"[ ,./\-_*^]")

ExpectedCall = dict[str, dict[str, list[JsonValue]]]
"""`{name: {argument: allowed values}}`, one name each, as the leaderboard writes it."""


class FunctionCall(Grader):
    """The reply makes the expected calls. `[]`: it makes none; "any": it makes at least one, whichever."""

    type: Literal["function_call"]
    calls: list[ExpectedCall] | Literal["any"]

    async def grade(self, submission: Submission, resources: GradingResources) -> Outcome:
        readable = [call for call in submission.calls if call.arguments is not None]
        if self.calls == "any":
            return right("a call was made") if readable else wrong("no call was made")
        if not self.calls:
            return wrong(f"{quote(readable[0].name)} was called, and no call fits") if readable else right("no call")
        problem = find_problem(submission.calls, self.calls, submission.tools)
        return right("the calls are the expected ones") if problem is None else wrong(problem)

    def check(self, tools: Sequence[ToolDefinition], resources: GradingResources, *, has_database: bool) -> None:
        if not tools:
            raise ValueError("the grader 'function_call' needs tools: give the row a list of them")
        for expected in self.calls if self.calls != "any" else ():
            if len(expected) != 1:
                raise ValueError(f"an expected call is {{name: arguments}} with one name, not {quote(expected)}")
            ((name, arguments),) = expected.items()
            schema = _find_schema(tools, name)
            if schema is None:
                raise ValueError(f"the expected call {name!r} is none of the row's tools")
            needed = {parameter for parameter, values in arguments.items() if OPTIONAL not in values}
            if unknown := sorted(needed - schema.get("properties", {}).keys()):
                raise ValueError(f"the tool {name!r} has no parameter {unknown[0]!r}, so no call can be right")


def find_problem(
    calls: Sequence[Call], expected: Sequence[ExpectedCall], tools: Sequence[ToolDefinition]
) -> str | None:
    """Return why the calls are not the expected ones; None if they are."""
    if len(calls) != len(expected):
        return f"{len(expected)} calls were expected, not {len(calls)}"
    left = list(calls)
    for one in expected:
        ((name, allowed),) = one.items()
        schema = _find_schema(tools, name) or {}
        problems = []
        for position, call in enumerate(left):
            problem = _check_call(call, name, allowed, schema)
            if problem is None:
                del left[position]  # not `remove`: 5 == 5.0, so it may take another call
                break
            problems.append(problem)
        else:
            return problems[0] if len(problems) == 1 else f"no call fits {name!r}: {'; '.join(problems)}"
    return None


def _find_schema(tools: Sequence[ToolDefinition], name: str) -> dict[str, Any] | None:
    return next((tool["function"].get("parameters", {}) for tool in tools if tool["function"]["name"] == name), None)


def _check_call(call: Call, name: str, allowed: Mapping[str, list[JsonValue]], schema: Mapping[str, Any]) -> str | None:
    if call.name != name:
        return f"{quote(call.name)} was called, not {name!r}"
    if call.arguments is None:
        return f"the arguments of {name!r} are not a JSON object"
    for parameter in schema.get("required", ()):
        if parameter not in call.arguments:
            return f"{name!r} lacks the argument {parameter!r}"
    properties = schema.get("properties", {})
    for parameter, value in call.arguments.items():
        if parameter not in properties or parameter not in allowed:
            return f"{name!r} has an argument {quote(parameter)} that is not expected"
        if problem := _check_value(value, allowed[parameter], properties[parameter]):
            return f"{name!r}, argument {parameter!r}: {problem}"
    for parameter, values in allowed.items():
        if parameter not in call.arguments and OPTIONAL not in values:
            return f"{name!r} lacks the argument {parameter!r}"
    return None


def _check_value(value: JsonValue, allowed: Sequence[JsonValue], schema: Mapping[str, Any]) -> str | None:
    """Return why `value` is none of the allowed ones, its type included; None if it is."""
    declared = _type_of(schema)
    item_type = _type_of(schema.get("items") or {}) if declared is list and schema.get("items") else None
    if declared is float and type(value) is int:
        value = float(value)
    allowed_type = _type_of_allowed(allowed)
    if type(value) is declared:
        if item_type is not None and not any(_has_item_types(value, each, item_type) for each in allowed):
            return f"{quote(value)} has items of a wrong type"
        compares_plainly = allowed_type not in (None, declared)
    elif type(value) is allowed_type:
        compares_plainly = True
    else:
        return f"{quote(value)} is of the type {type(value).__name__}, not {declared.__name__}"
    if not compares_plainly and not _is_allowed(value, allowed, item_type):
        return f"{quote(value)} is none of {quote(list(allowed))}"
    if compares_plainly and value not in allowed:
        return f"{quote(value)} is none of {quote(list(allowed))}"
    return None


def _type_of(schema: Mapping[str, Any]) -> type:
    """Return the Python type of a schema's values; text where the schema declares none."""
    declared = schema.get("type", "string")
    if isinstance(declared, list):
        declared = next((each for each in declared if each != "null"), "string")
    return TYPES.get(declared, str)


def _type_of_allowed(allowed: Sequence[JsonValue]) -> type | None:
    return next((type(each) for each in allowed if each != OPTIONAL), None)


def _has_item_types(items: JsonValue, allowed: JsonValue, item_type: type) -> bool:
    """Return whether all items have the declared type, or that of the first item of an allowed list."""
    if not isinstance(allowed, list) or not isinstance(items, list):
        return True
    types = (item_type, _type_of_allowed(allowed))
    return all(type(item) in types for item in items)


def _is_allowed(value: JsonValue, allowed: Sequence[JsonValue], item_type: type | None) -> bool:
    if isinstance(value, dict):
        return any(isinstance(each, dict) and _fits_object(value, each) for each in allowed)
    if isinstance(value, list) and item_type is dict:
        return any(_fits_objects(value, each) for each in allowed)
    if isinstance(value, list):
        return _plain_items(value) in [_plain_items(each) for each in allowed if isinstance(each, list | str)]
    if isinstance(value, str):
        return _plain(value) in [_plain(each) for each in allowed if isinstance(each, str)]
    return value in allowed


def _fits_objects(values: Sequence[JsonValue], allowed: JsonValue) -> bool:
    """Return whether each object fits the allowed one at its position."""
    if not isinstance(allowed, list | str) or len(values) != len(allowed):
        return False
    return all(
        isinstance(each, dict) and _fits_object(value, each) for value, each in zip(values, allowed, strict=True)
    )


def _fits_object(value: JsonValue, allowed: Mapping[str, Any]) -> bool:
    """Return whether an object has allowed values only and lacks none that is required."""
    if not isinstance(value, dict):
        return False
    for key, each in value.items():
        if key not in allowed or _plain(each) not in [_plain(one) for one in _list_allowed(allowed[key])]:
            return False
    return all(key in value or OPTIONAL in _list_allowed(values) for key, values in allowed.items())


def _list_allowed(values: JsonValue) -> list[JsonValue]:
    """Return the allowed values of a key; a few published answers give one bare value, at which the leaderboard's
    checker fails."""
    return values if isinstance(values, list) else [values]


def _plain_items(items: Sequence[JsonValue]) -> list[JsonValue]:
    return [_plain(item) for item in items]


def _plain(value: JsonValue) -> JsonValue:
    """Return a text without case and the ignored characters, and any other value as it is."""
    return _IGNORED.sub("", value).lower().replace("'", '"') if isinstance(value, str) else value
