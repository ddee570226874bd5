"""Stops the engine for a while, so that training can use its hardware, and starts it again.

    close (new turns get 503) -> drain (turns under way finish) -> stop -> [the window] -> start -> token, adapters

Invariants: however the window ends (done, failed, cancelled), the engine may start again, without an `await` before
that; episodes that wait for a client's tool results are not closed meanwhile. Hazard: only `Engine.watch` starts the
engine again, so it must be running; when the server itself stops, nothing is started.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import structlog

from runtime.agent.open_episodes import OpenEpisodes
from runtime.engine.process import Engine
from runtime.errors import EngineInMaintenance
from runtime.serving.hotswap import HotSwap

log = structlog.get_logger()

NUM_STARTS = 2
"""Starts of the engine that a window waits for at its end: the first may fail."""


class Maintenance:
    """At most one window at a time in which the engine is down."""

    def __init__(self, engine: Engine, hotswap: HotSwap, episodes: OpenEpisodes, *, drain_seconds: float) -> None:
        self._engine = engine
        self._hotswap = hotswap
        self._episodes = episodes
        self._drain_seconds = drain_seconds
        self.reason: str | None = None
        """The reason why turns are rejected; None while they are accepted."""
        self.num_windows = 0

    def require_serving(self) -> None:
        """Raise EngineInMaintenance while a window is open."""
        if self.reason is not None:
            raise EngineInMaintenance(f"the engine is stopped for a while: {self.reason}; ask again later")

    @contextlib.asynccontextmanager
    async def window(self, reason: str) -> AsyncIterator[None]:
        """Keep the engine stopped while the context is open. When it closes without an error, the engine is ready.

        Raises:
            EngineInMaintenance: another window is open.
            EngineError: this process did not start the engine, or it did not come back.
        """
        self.require_serving()
        # No `await` since the check above, or two windows could open.
        self.reason = reason
        began = time.monotonic()
        try:
            # Leases first, or a turn could begin after the drain.
            self._hotswap.close(reason)
            self._episodes.pause_sweeps()
            await self._drain()
            await self._engine.suspend()
            self.num_windows += 1
            log.info("maintenance window opened", reason=reason, drained_seconds=time.monotonic() - began)
            yield
        finally:  # no `await` in here: a second cancellation would skip the rest
            self._engine.resume()
            self._episodes.resume_sweeps(within_seconds=self._engine.config.startup_seconds)
            self._hotswap.open()
            self.reason = None
            log.info("maintenance window closed", reason=reason, seconds=time.monotonic() - began)
        await self._engine.wait_until_ready(NUM_STARTS * self._engine.config.startup_seconds)

    async def _drain(self) -> None:
        """Wait until no lease is left, for as long as an episode may take."""
        try:
            async with asyncio.timeout(self._drain_seconds):
                await self._hotswap.wait_until_idle()
        except TimeoutError:
            # Turns that are left lose their call, and wait in `_ask_policy` until the window or their own time is over.
            log.warning("not drained in time: the engine is stopped all the same", leases=self._hotswap.num_leases)
