"""A call of a tool always returns a result or an error."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from runtime.errors import ToolError
from runtime.tools.base import Tool, run_tool
from runtime.tools.functions import tool_from_function
from tests.runtime.tools.functions import find_train
from tests.support.waiting import wait_until


def hang() -> str:
    """Hang."""
    time.sleep(60)
    return ""


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
    assert await asyncio.to_thread(threading.active_count) >= 40  # the threads still hang, but the pool is free
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
    async with asyncio.timeout(30):
        await was_cancelled.wait()


async def test_a_long_result_is_cut():
    async def chatter(arguments: dict[str, object]) -> str:
        return "x" * 1000

    result = await run_tool(Tool("chatter", "", {"type": "object"}, chatter, max_output_chars=10), "{}")
    assert result.content == "xxxxxxxxxx\n[990 more characters were cut]"


def text_tool(call, **limits) -> Tool:
    return Tool("any", "", {"type": "object"}, call, **limits)


async def test_a_result_that_is_no_text_is_an_error():
    async def number(arguments: dict[str, object]):
        return 7

    assert (await run_tool(text_tool(number), "{}")).error == "'any' returned int, not text"


async def test_an_error_that_cannot_even_be_shown_is_still_an_error():
    class Unspeakable(Exception):
        def __str__(self) -> str:
            raise ValueError

    async def fail(arguments: dict[str, object]) -> str:
        raise Unspeakable

    assert "Unspeakable" in (await run_tool(text_tool(fail), "{}")).error


async def test_a_schema_that_points_elsewhere_is_never_fetched():
    async def never(arguments: dict[str, object]) -> str:
        raise AssertionError

    tool = Tool("any", "", {"$ref": "http://127.0.0.1:9/schema.json"}, never)
    assert "Unresolvable: http://127.0.0.1:9/schema.json" in (await run_tool(tool, "{}")).error


async def test_an_argument_of_a_megabyte_is_not_repeated_in_the_complaint():
    arguments = f'{{"origin": ["{"x" * 1_000_000}"]}}'
    result = await run_tool(tool_from_function(find_train), arguments)
    assert result.is_invalid and len(result.content) < 3_000


async def test_no_more_calls_at_once_than_there_are_places():
    now, most = 0, 0

    async def work(arguments: dict[str, object]) -> str:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.01)
        now -= 1
        return "done"

    tool = text_tool(work, max_concurrency=3)
    results = await asyncio.gather(*(run_tool(tool, "{}") for _ in range(12)))
    assert {result.content for result in results} == {"done"}
    assert most == 3


async def test_a_call_that_hangs_keeps_its_place_until_its_thread_ends():
    ending = threading.Event()

    def hang_on() -> str:
        """Hang until told to end."""
        ending.wait(30)
        return "ended"

    tool = tool_from_function(hang_on, timeout_seconds=0.1, max_concurrency=1)
    assert "gave no result" in (await run_tool(tool, "{}")).error
    assert "is busy: no slot came free in 0.1 seconds" in (await run_tool(tool, "{}")).error
    ending.set()
    while (result := await run_tool(tool, "{}")).error:
        await asyncio.sleep(0.01)
    assert result.content == "ended"


async def test_who_leaves_the_queue_takes_no_place():
    tool = tool_from_function(find_train, max_concurrency=1)
    await tool.slots.acquire()
    waiting = asyncio.create_task(run_tool(tool, '{"origin": "Oslo"}'))
    await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    tool.slots.release()
    assert (await run_tool(tool, '{"origin": "Oslo"}')).error is None


async def test_the_loop_stays_responsive_while_blocking_tools_block():
    started, release = threading.Semaphore(0), threading.Event()

    def block() -> str:
        """Block until the loop has seen it."""
        started.release()
        return "ok" if release.wait(30) else "the loop stood still"

    tool = tool_from_function(block)
    results = asyncio.gather(*(run_tool(tool, "{}") for _ in range(20)))
    for _ in range(2):  # two in parallel
        await wait_until(lambda: started.acquire(blocking=False))
    release.set()
    assert {result.content for result in await results} == {"ok"}
