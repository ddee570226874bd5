"""How long an event loop was held up by anything that ran on it, or that kept the interpreter to itself."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

TICK_SECONDS = 0.002


class LongestGap:
    """The longest time between two ticks of a task that only sleeps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextlib.asynccontextmanager
    async def watch(self) -> AsyncIterator[LongestGap]:
        ticking = asyncio.ensure_future(self._tick())
        await asyncio.sleep(TICK_SECONDS)
        try:
            yield self
            await asyncio.sleep(TICK_SECONDS)  # a gap that ends now is measured by the tick after it
        finally:
            ticking.cancel()

    async def _tick(self) -> None:
        while True:
            began = time.perf_counter()
            await asyncio.sleep(TICK_SECONDS)
            self.seconds = max(self.seconds, time.perf_counter() - began)
