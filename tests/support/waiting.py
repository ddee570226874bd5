"""Waits for conditions that another task or thread fulfils. The limits allow for a busy machine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

SECONDS = 60.0


async def wait_until(condition: Callable[[], bool]) -> None:
    """Return once the condition holds. Raises TimeoutError after `SECONDS`."""
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.005)


def eventually(holds: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Wait until a condition holds; return False if it does not in time."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
