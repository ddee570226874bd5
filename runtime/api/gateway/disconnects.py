"""Clients that leave before they are answered: nobody waits for their work any more."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

from fastapi import Request

from runtime.api.errors import ClientLeft


async def unless_left(request: Request, work: Awaitable[None]) -> None:
    """Wait for `work`; cancel it when the client leaves. Raises: ClientLeft."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(wait_until_left(request))
    try:
        done, _ = await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working not in done:
            raise ClientLeft("the client left before its tasks were prepared")
        working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.wait({working, leaving})


async def wait_until_left(request: Request) -> None:
    """Return once the client has left. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
