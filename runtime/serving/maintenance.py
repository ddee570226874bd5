"""Stops the engine for a while, so that something else can have its hardware, and brings it back proved.

    close (new turns get 503) -> drain (turns under way finish) -> stop -> [the window] -> start -> token, adapters

Invariants: however the window ends (done, failed, cancelled), the engine is told to come back, without waiting for
anything; what waits for a client's tools is not closed meanwhile. Hazard: `Engine.watch` must be running, because it
starts the engine again; when the server itself is stopped, `watch` is gone and nothing is started.
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
"""How many starts of the engine are waited for after a window."""


class Maintenance:
    """At most one window at a time in which the engine is down."""

    def __init__(self, engine: Engine, hotswap: HotSwap, episodes: OpenEpisodes, *, drain_seconds: float) -> None:
        self._engine = engine
        self._hotswap = hotswap
        self._episodes = episodes
        self._drain_seconds = drain_seconds
        self.reason: str | None = None
        """Why no turns are taken; None while they are."""
        self.num_windows = 0

    def require_serving(self) -> None:
        """Raise EngineInMaintenance while a window is open."""
        if self.reason is not None:
            raise EngineInMaintenance(f"the engine is stopped for a while: {self.reason}; ask again later")

    @contextlib.asynccontextmanager
    async def window(self, reason: str) -> AsyncIterator[None]:
        """Have the engine down for as long as the context is open. Left without an error, the engine is ready again.

        Raises:
            EngineInMaintenance: another window is open.
            EngineError: the engine is not ours to stop, or did not come back.
        """
        self.require_serving()
        self.reason = reason
        began = time.monotonic()
        try:
            self._hotswap.close(reason)
            self._episodes.pause_sweeps()
            await self._drain()
            await self._engine.suspend()
            self.num_windows += 1
            log.info("maintenance window opened", reason=reason, drained_seconds=time.monotonic() - began)
            yield
        finally:  # nothing in here waits: who was cancelled may be cancelled again
            self._engine.resume()
            self._episodes.resume_sweeps(within_seconds=self._engine.config.startup_seconds)
            self._hotswap.open()
            self.reason = None
            log.info("maintenance window closed", reason=reason, seconds=time.monotonic() - began)
        await self._engine.wait_until_ready(NUM_STARTS * self._engine.config.startup_seconds)

    async def _drain(self) -> None:
        """Wait until nobody uses the engine, for as long as an episode may take."""
        try:
            async with asyncio.timeout(self._drain_seconds):
                await self._hotswap.wait_until_idle()
        except TimeoutError:
            log.warning("not drained in time: the engine is stopped all the same", leases=self._hotswap.num_leases)
