"""Measures how long an event loop was blocked by code that ran on it or held the interpreter's lock."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

TICK_SECONDS = 0.002


class LongestGap:
    """The longest time between two ticks of a task that only sleeps.

    `cpu_seconds` is the most processor time used in a gap: on a busy machine it says more than wall time.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.cpu_seconds = 0.0

    @contextlib.asynccontextmanager
    async def watch(self) -> AsyncIterator[LongestGap]:
        ticking = asyncio.ensure_future(self._tick())
        await asyncio.sleep(TICK_SECONDS)
        try:
            yield self
            await asyncio.sleep(TICK_SECONDS)  # lets the tick after the last gap measure it
        finally:
            ticking.cancel()

    async def _tick(self) -> None:
        while True:
            began, cpu_began = time.perf_counter(), time.process_time()
            await asyncio.sleep(TICK_SECONDS)
            self.seconds = max(self.seconds, time.perf_counter() - began)
            self.cpu_seconds = max(self.cpu_seconds, time.process_time() - cpu_began)
