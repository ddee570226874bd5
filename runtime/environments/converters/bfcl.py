"""The single-turn Python categories of the Berkeley Function-Calling Leaderboard as tasks.

The leaderboard has no training set. Tasks are divided by the functions that they offer: two tasks with a function of
the same name, or of a name made of the same words, are on the same side. A figure on the held-out part is therefore
not the leaderboard's; all of it is held out with `serve.py play` before anything was learned.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from runtime.environments.converters.published import read_json_lines
from runtime.environments.graders.base import GradingResources
from runtime.environments.graders.function_calls import FunctionCall

CATEGORIES = (
    "simple_python",
    "multiple",
    "parallel",
    "parallel_multiple",
    "live_simple",
    "live_multiple",
    "live_parallel",
    "live_parallel_multiple",
    "irrelevance",
    "live_irrelevance",
    "live_relevance",
)
"""Those that are present are read."""
JSON_TYPES = {
    "dict": "object",
    "float": "number",
    "tuple": "array",
    "any": "string",
}
# Percent of the groups of functions; the largest groups go to practice, and make up for its small share here.
_SPLITS = (("practice", 35), ("held-out", 85), ("sealed", 100))
LARGEST_SHARE = 0.05
"""A group with more than this share of the tasks is practice: held out, it would decide alone."""


def read_bfcl(source: Path) -> Iterator[dict[str, Any]]:
    """Yield the tasks of the files `BFCL_v4_<category>.json` and `possible_answer/` of a folder."""
    tasks = [task for category in CATEGORIES for task in _read_category(source, category)]
    yield from divide_by_function(tasks)


def _read_category(source: Path, category: str) -> Iterator[dict[str, Any]]:
    for path in sorted(source.glob(f"BFCL_v[0-9]_{category}.json")):
        answers_path = path.parent / "possible_answer" / path.name
        has_answers = "relevance" not in category
        answers = {row["id"]: row["ground_truth"] for row in read_json_lines(answers_path)} if has_answers else {}
        for row in read_json_lines(path):
            calls = answers[row["id"]] if has_answers else [] if "irrelevance" in category else "any"
            task = {
                "name": row["id"],
                "kind": category,
                "messages": row["question"][0],
                "tools": [to_tool(function) for function in row["function"]],
                "grader": {"type": "function_call", "calls": _rename(calls)},
            }
            if _is_decidable(task):
                yield task


def _is_decidable(task: dict[str, Any]) -> bool:
    """Return whether replies can be right and wrong. Four published rows offer no function, and the answers of two
    have an argument that the function lacks."""
    try:
        FunctionCall.model_validate(task["grader"]).check(task["tools"], GradingResources(), has_database=False)
    except ValueError:
        return False
    return True


def to_tool(function: dict[str, Any]) -> dict[str, Any]:
    """Return a function of the leaderboard as a tool in OpenAI's form: without dots in its name, with JSON's types."""
    definition = {**function, "name": to_name(function["name"]), "parameters": _convert(function["parameters"])}
    return {"type": "function", "function": definition}


def to_name(name: str) -> str:
    return name.replace(".", "_")


def _rename(calls: list[dict[str, Any]] | str) -> list[dict[str, Any]] | str:
    if isinstance(calls, str):
        return calls
    return [{to_name(name): arguments for name, arguments in call.items()} for call in calls]


def _convert(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema with JSON's names of types, and without the key `optional`, which JSON Schema does not have."""
    converted = {key: value for key, value in schema.items() if key != "optional"}
    if isinstance(schema.get("type"), str):
        converted["type"] = JSON_TYPES.get(schema["type"], schema["type"])
    if isinstance(schema.get("properties"), dict):
        converted["properties"] = {name: _convert(each) for name, each in schema["properties"].items()}
    if isinstance(schema.get("items"), dict):
        converted["items"] = _convert(schema["items"])
    return converted


def divide_by_function(tasks: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the tasks with a split each, such that no function is offered on two sides."""
    group_of = _group([[_words(tool["function"]["name"]) for tool in task["tools"]] for task in tasks])
    sizes: dict[str, int] = {}
    for group in group_of:
        sizes[group] = sizes.get(group, 0) + 1
    for task, group in zip(tasks, group_of, strict=True):
        percent = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") % 100
        split = next(split for split, end in _SPLITS if percent < end)
        if sizes[group] > LARGEST_SHARE * len(tasks):
            split = "practice"
        task = {**task, "split": split}
        if split == "practice" and task["grader"]["calls"] != "any":
            # A few published answers leave an argument no allowed value, so that no call is right.
            with contextlib.suppress(IndexError):
                task["demonstration"] = [_demonstrate(task["grader"]["calls"], task["tools"])]
        yield task


def _demonstrate(calls: Sequence[dict[str, dict[str, list[Any]]]], tools: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a message that makes the expected calls, without what may be left out; without any, it says so."""
    if not calls:
        return {"role": "assistant", "content": "None of the functions can do this."}
    required = {tool["function"]["name"]: tool["function"]["parameters"]["required"] for tool in tools}
    tool_calls = []
    for number, call in enumerate(calls):
        ((name, allowed),) = call.items()
        arguments = json.dumps(_choose(allowed, required[name]), ensure_ascii=False)
        function = {"name": name, "arguments": arguments}
        tool_calls.append({"id": f"call-{number}", "type": "function", "function": function})
    return {"role": "assistant", "content": "", "tool_calls": tool_calls}


def _choose(allowed: dict[str, list[Any]], required: Sequence[str] = ()) -> dict[str, Any]:
    """Return arguments that are allowed, without those that may be left out."""
    return {key: _first_value(values) for key, values in allowed.items() if "" not in values or key in required}


def _first_value(values: list[Any]) -> Any:
    """Return the first allowed value; objects list the allowed values of each of their keys."""
    value = next((each for each in values if each != ""), values[0])
    if isinstance(value, dict):
        return _choose(value)
    return [_choose(each) if isinstance(each, dict) else each for each in value] if isinstance(value, list) else value


def _group(names: Sequence[Sequence[str]]) -> list[str]:
    """Return the group of each list of names; lists that share a name, directly or through others, share the group.

    A group is called after the smallest of its names, so that it does not depend on the order of the lists.
    """
    parents: dict[str, str] = {}

    def find(name: str) -> str:
        while parents.setdefault(name, name) != name:
            name = parents[name]
        return name

    for each in names:
        for name in each[1:]:
            smaller, larger = sorted((find(each[0]), find(name)))
            parents[larger] = smaller
    return [find(each[0]) for each in names]


def _words(name: str) -> str:
    """Return the words of a function's name in the order of the alphabet: `area.calculate` and `calculateArea` are
    one."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()
    return " ".join(sorted(re.findall(r"[a-z]+|\d+", spaced)))
