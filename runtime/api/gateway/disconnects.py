"""Cancels the work of a request when its client disconnects.

Hazard: `wait_for_disconnect` consumes messages, so that the body must have been read before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from fastapi import Request

from runtime.api.errors import ClientLeft

Result = TypeVar("Result")


async def cancel_on_disconnect(request: Request, work: Awaitable[Result]) -> Result:
    """Return the result of `work`; cancel it when the client disconnects. Raises: ClientLeft."""
    work_task = asyncio.ensure_future(work)
    disconnect = asyncio.ensure_future(wait_for_disconnect(request))
    try:
        done, _ = await asyncio.wait({work_task, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if work_task not in done:
            raise ClientLeft("the client left before the answer")
        return work_task.result()
    finally:
        work_task.cancel()
        disconnect.cancel()
        await asyncio.wait({work_task, disconnect})  # until the cancelled work has released its resources


async def wait_for_disconnect(request: Request) -> None:
    """Return once the client has disconnected. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
