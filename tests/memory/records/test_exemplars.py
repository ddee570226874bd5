"""The text of exemplars."""

from __future__ import annotations

import json

import pytest

from memory.records.exemplars import render_call, render_exemplar
from memory.schema import Step, StepKind
from tests.memory.episodes import command_call


def model(content: str, *calls: dict) -> Step:
    return Step(trajectory_id="t", position=0, kind=StepKind.MODEL, content=content, tool_calls=list(calls))


def tool(content: str) -> Step:
    return Step(trajectory_id="t", position=0, kind=StepKind.TOOL, content=content)


def test_a_solved_task_reads_as_commands_and_what_came_back():
    steps = [
        model("", command_call("open fridge")),
        tool("You open the fridge.\n\n  It is cold.\nA carrot.\nA knife."),
        model("Rule fry: stove.", command_call("cook carrot  with stove")),
        tool("x" * 500),
        model("All is cooked."),
    ]
    assert render_exemplar("Prepare the meal.", steps) == (
        "Prepare the meal.\n> open fridge\nYou open the fridge.\nIt is cold.\nA carrot.\n"
        f"Rule fry: stove.\n> cook carrot with stove\n{'x' * 240}\nAll is cooked."
    )


@pytest.mark.parametrize(
    ("arguments", "rendered"),
    [
        ('{"command": "look"}', "look"),
        ({"command": "look"}, "look"),
        ('{"n": 3}', "act(n=3)"),
        ('{"a": "x", "b": [1, "ü"]}', 'act(a="x", b=[1, "ü"])'),
        ("{}", "act()"),
        ("", "act()"),
        ("{not json", "act({not json)"),
        ("[1]", "act([1])"),
    ],
)
def test_a_call_is_shown_compactly(arguments, rendered: str):
    assert render_call({"function": {"name": "act", "arguments": arguments}}) == rendered


def test_a_call_without_a_function_is_no_crash():
    assert render_call({}) == "()"
    assert render_call(json.loads('{"function": null}')) == "()"
