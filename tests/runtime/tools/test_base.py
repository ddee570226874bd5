"""Tools: schemas from functions, and calls that always come back."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Literal

import pytest

from runtime.errors import ToolError
from runtime.tools.base import Tool, run_tool
from runtime.tools.functions import tool_from_function


def find_train(origin: str, seats: int = 1, comfort: Literal["plain", "quiet"] = "plain") -> dict[str, object]:
    """Find the next train.

    Args:
        origin: where to board,
            by its full name
        seats: how many
    """
    return {"from": origin, "seats": seats, "comfort": comfort}


def hang() -> str:
    """Hang."""
    time.sleep(60)
    return ""


def test_type_hints_and_docstring_become_the_schema():
    function = tool_from_function(find_train).definition()["function"]
    assert (function["name"], function["description"]) == ("find_train", "Find the next train.")
    properties = function["parameters"]["properties"]
    assert properties["origin"] == {"type": "string", "description": "where to board, by its full name"}
    assert properties["comfort"]["enum"] == ["plain", "quiet"]
    assert function["parameters"]["required"] == ["origin"]


def test_a_parameter_without_a_type_is_refused_by_name():
    def shout(text):
        """Shout."""

    with pytest.raises(ValueError, match="parameter 'text' has no type hint"):
        tool_from_function(shout)
    with pytest.raises(ValueError, match="'rest' has no name in JSON"):
        tool_from_function(lambda *rest: None, name="any")


async def test_a_call_is_checked_run_in_a_thread_and_shown_as_json():
    result = await run_tool(tool_from_function(find_train), '{"origin": "Oslo"}')
    assert (result.content, result.error) == ('{"from":"Oslo","seats":1,"comfort":"plain"}', None)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ("{origin}", "are not valid JSON"),
        ('"Oslo"', "are not a JSON object"),
        ("{}", "'origin' is a required property"),
        ('{"origin": 7}', "$.origin: 7 is not of type 'string'"),
        ('{"origin": "Oslo", "via": "Bergen"}', "'via' was unexpected"),
        ("[" * 100_000, "are not valid JSON"),
    ],
)
async def test_a_malformed_call_says_what_is_wrong(arguments: str, error: str):
    result = await run_tool(tool_from_function(find_train), arguments)
    assert result.is_invalid and error in result.error
    assert result.content == f"Error: {result.error}"


async def test_a_tool_that_raises_yields_its_error():
    def fail() -> str:
        """Fail."""
        raise KeyError("gone")

    async def decline() -> str:
        """Decline."""
        raise ToolError("closed on Sundays")

    failed = await run_tool(tool_from_function(fail), "{}")
    assert (failed.content, failed.is_invalid) == ("Error: KeyError: 'gone'", False)
    assert (await run_tool(tool_from_function(decline), "")).error == "closed on Sundays"


async def test_tools_that_hang_time_out_and_hold_up_nobody():
    hanging = tool_from_function(hang, timeout_seconds=0.05)
    started = time.monotonic()
    results = await asyncio.gather(*(run_tool(hanging, "{}") for _ in range(40)))
    assert {result.error for result in results} == {"TimeoutError: 'hang' gave no result within 0.05 seconds"}
    assert await asyncio.to_thread(threading.active_count) >= 40  # they hang on, and the pool is still free
    assert time.monotonic() - started < 5


async def test_who_cancels_a_call_cancels_the_tool():
    was_cancelled = asyncio.Event()

    async def wait(arguments: dict[str, object]) -> str:
        try:
            await asyncio.sleep(3600)
        finally:
            was_cancelled.set()
        return ""

    task = asyncio.create_task(run_tool(Tool("wait", "", {"type": "object"}, wait), "{}"))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(was_cancelled.wait(), 1)


async def test_a_long_result_is_cut():
    async def chatter(arguments: dict[str, object]) -> str:
        return "x" * 1000

    result = await run_tool(Tool("chatter", "", {"type": "object"}, chatter, max_output_chars=10), "{}")
    assert result.content == "xxxxxxxxxx\n[990 more characters were cut]"
