"""A real MCP server to test against: `python mcp_server.py`, or `python mcp_server.py PORT` over HTTP."""

from __future__ import annotations

import os
import sys
import time

from mcp.server.mcpserver import Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import ToolAnnotations

server = MCPServer("shop", log_level="ERROR")


@server.tool(annotations=ToolAnnotations(read_only_hint=True))
def price(article: str, number: int = 1) -> str:
    """Say what an article costs."""
    return f"{number} x {article}: {number * 3}"


@server.tool()
def send_order(article: str) -> str:
    """Order an article, for real."""
    return f"ordered {article}; token {os.environ.get('SHOP_TOKEN')}; secret {os.environ.get('OTHER_SECRET')}"


@server.tool()
def refuse() -> str:
    """Raise."""
    raise ToolError("closed on Sundays")


@server.tool()
def picture() -> Image:
    """Return what is no text."""
    return Image(data=b"\x89PNG", format="png")


@server.tool()
def dawdle(seconds: float) -> str:
    """Take a while."""
    time.sleep(seconds)
    return "at last"


@server.tool()
def die() -> str:
    """End the server in the middle of a call."""
    print("the shop burnt down", file=sys.stderr, flush=True)
    os._exit(1)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[1]))
    else:
        server.run()
