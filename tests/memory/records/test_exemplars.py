"""The text of exemplars."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import Engine, event, inspect

from memory.records.exemplars import render_call, render_exemplar
from memory.schema import Step, StepKind
from memory.store import Memory
from tests.memory.episodes import command_call, play


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


@contextmanager
def statements() -> Iterator[list[tuple[str, threading.Thread]]]:
    """Collect the SQL of all queries, each with its thread."""
    asked: list[tuple[str, threading.Thread]] = []

    def note(connection, cursor, statement: str, *_: object) -> None:
        asked.append((statement, threading.current_thread()))

    event.listen(Engine, "before_cursor_execute", note)
    try:
        yield asked
    finally:
        event.remove(Engine, "before_cursor_execute", note)


async def test_what_no_list_and_no_exemplar_shows_is_not_read(memory: Memory):
    await play(memory, task_text="fry it")
    await memory.index.drain()
    with statements() as asked:
        (listed,) = memory.reviews.exemplars(tenant="")
        (view,) = memory.trajectories.select()
    assert "you look" in listed.text and len(asked) > 2
    assert not [sql for sql, _ in asked if "token_ids" in sql]
    for row in (listed.trajectory, view.trajectory):
        assert {"opening", "tools", "memory_ids"} <= inspect(row).unloaded
    with statements() as asked:
        found = await memory.retrieval.retrieve(environment="kitchen", kind="cooking", query_text="fry it")
    assert found.ids == [view.trajectory.id]
    of_steps = [(sql, thread) for sql, thread in asked if "FROM steps" in sql]
    assert of_steps and not [sql for sql, _ in of_steps if "token_ids" in sql]
    assert threading.main_thread() not in [thread for _, thread in of_steps]
