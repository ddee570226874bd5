"""MCP: a real server over both transports; its tools, errors and crashes."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from runtime.config import McpServerConfig
from runtime.errors import ToolRefused
from runtime.tools.base import Tool, run_tool
from runtime.tools.mcp import McpServer

pytestmark = pytest.mark.asyncio(loop_scope="module")

SERVER = str(Path(__file__).with_name("mcp_server.py"))


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


class Shop:
    """A server and its tools by name."""

    def __init__(self, server: McpServer, clock: Clock, tools: list[Tool]) -> None:
        self.server = server
        self.clock = clock
        self.tools = {tool.name: tool for tool in tools}

    async def ask(self, name: str, arguments: str = "{}"):
        return await run_tool(self.tools[name], arguments)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shop(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Shop]:
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOP_TOKEN", "t0ken")
        patch.setenv("OTHER_SECRET", "hidden")
        config = McpServerConfig(command=[sys.executable, SERVER], env=["SHOP_TOKEN"])
        server = McpServer("shop", config, tmp_path_factory.mktemp("logs"), clock=clock)
        yield Shop(server, clock, await server.open())
        await server.close()


@pytest.fixture(scope="module")
def port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        return listener.getsockname()[1]


def serve_http(port: int) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, SERVER, str(port)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return process
        except OSError:
            time.sleep(0.05)
    raise AssertionError("the test's MCP server did not start")


def stop(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()


@pytest.fixture
def http_server(port: int) -> Iterator[subprocess.Popen]:
    process = serve_http(port)
    yield process
    stop(process)


async def test_a_servers_tools_are_ours_with_their_schemas(shop: Shop):
    function = shop.tools["price"].definition()["function"]
    assert function["description"] == "Say what an article costs."
    assert function["parameters"]["required"] == ["article"]
    result = await shop.ask("price", '{"article": "tea", "number": 2}')
    assert (result.content, result.error) == ("2 x tea: 6", None)


async def test_only_a_tool_that_is_called_read_only_has_no_side_effects(shop: Shop):
    assert not shop.tools["price"].has_side_effects
    assert not shop.tools["price"].is_trusted
    assert shop.tools["send_order"].has_side_effects


async def test_a_server_gets_the_variables_it_is_given_and_no_others(shop: Shop):
    result = await shop.ask("send_order", '{"article": "tea"}')
    assert result.content == "ordered tea; token t0ken; secret None"


async def test_a_tool_that_raises_over_there_is_an_error_here(shop: Shop):
    result = await shop.ask("refuse")
    assert "closed on Sundays" in result.error


async def test_what_is_no_text_is_named(shop: Shop):
    assert (await shop.ask("picture")).content == "[image, image/png: not shown]"


async def test_a_malformed_call_never_reaches_the_server(shop: Shop):
    result = await shop.ask("price", '{"article": 7}')
    assert result.is_invalid and "7 is not of type 'string'" in result.error


async def test_a_call_that_takes_too_long_is_given_up_and_the_next_one_answered(shop: Shop):
    result = await run_tool(replace(shop.tools["dawdle"], timeout_seconds=0.2), '{"seconds": 1}')
    assert "TimeoutError: 'dawdle' gave no result within 0.2 seconds" in result.error
    assert (await shop.ask("price", '{"article": "tea"}')).content == "1 x tea: 3"


async def test_a_server_that_dies_costs_that_call_and_is_started_anew_for_the_next(shop: Shop):
    died = await shop.ask("die")
    assert "the MCP server 'shop' died during the call" in died.error
    assert (await shop.ask("price", '{"article": "tea"}')).content == "1 x tea: 3"


async def test_a_server_that_keeps_dying_is_given_pauses(shop: Shop):
    assert "died" in (await shop.ask("die")).error
    assert "died" in (await shop.ask("die")).error
    assert "is down; it is tried again in 0.5 seconds" in (await shop.ask("price", '{"article": "tea"}')).error
    shop.clock.seconds += 1
    assert (await shop.ask("price", '{"article": "tea"}')).content == "1 x tea: 3"


async def test_a_server_over_http_answers_and_is_found_again_after_its_death(
    http_server: subprocess.Popen, port: int, tmp_path: Path
):
    server = McpServer("web-shop", McpServerConfig(url=f"http://127.0.0.1:{port}/mcp"), tmp_path)
    (price,) = [tool for tool in await server.open() if tool.name == "price"]
    assert (await run_tool(price, '{"article": "tea"}')).content == "1 x tea: 3"

    await asyncio.to_thread(stop, http_server)
    died = await run_tool(price, '{"article": "tea"}')
    assert "the MCP server 'web-shop'" in died.error and died.error.startswith("the MCP server")
    again = await asyncio.to_thread(serve_http, port)
    try:
        assert (await run_tool(price, '{"article": "tea"}')).content == "1 x tea: 3"
    finally:
        await server.close()
        stop(again)


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        (["/nowhere/shop"], "No such file"),
        ([sys.executable, "-c", "import sys; sys.exit('no shop today')"], "the end of its log: no shop today"),
    ],
)
async def test_a_server_that_does_not_start_is_refused_by_name_with_its_words(
    command: list[str], complaint: str, tmp_path: Path
):
    server = McpServer("broken", McpServerConfig(command=command), tmp_path)
    with pytest.raises(ToolRefused, match=r"the MCP server 'broken' \(.*check tools.mcp.broken") as refused:
        await server.open()
    assert complaint in str(refused.value)
    await server.close()


async def test_a_server_that_is_not_there_or_lacks_its_variable_is_refused(port: int, tmp_path: Path):
    absent = McpServer("absent", McpServerConfig(url=f"http://127.0.0.1:{port}/mcp"), tmp_path)
    with pytest.raises(ToolRefused, match=r"the MCP server 'absent' .*is not available"):
        await absent.open()
    config = McpServerConfig(url=f"http://127.0.0.1:{port}/mcp", headers={"Authorization": "NO_SUCH_VARIABLE"})
    with pytest.raises(ToolRefused, match="variable 'NO_SUCH_VARIABLE' is not set"):
        await McpServer("keyless", config, tmp_path).open()


async def test_a_server_that_never_answers_is_refused_in_time(tmp_path: Path):
    config = McpServerConfig(command=[sys.executable, "-c", "import time; time.sleep(60)"], startup_seconds=0.5)
    server = McpServer("mute", config, tmp_path)
    with pytest.raises(ToolRefused, match=r"no connection within 0\.5 seconds"):
        await server.open()
    await server.close()
