"""The components that routes work with, made by `serve.py` and injected by FastAPI.

The optimizer appears here only as the protocol `CycleRunner`: the runtime does not import it.
Invariant: routes keep no state of their own; everything they change is a row.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol

from fastapi import Depends, Request

from memory.schema import Cycle, Policy
from memory.store import Memory
from runtime.agent.graph import Agent
from runtime.api.gateway.admission import ConcurrencyLimit
from runtime.api.gateway.preparation_limit import PreparationLimit
from runtime.config import LimitsConfig, ServerConfig
from runtime.doctor import HealthCheck
from runtime.engine.process import Engine
from runtime.environments.base import Environment, find_environment
from runtime.maintenance import Maintenance
from runtime.serving.hotswap import HotSwap
from runtime.tools.toolbox import Toolbox

MAX_EMBEDDING_REQUESTS = 32
"""Requests for embeddings under way; they share one encoder, a batch each in turn."""


class CycleRunner(Protocol):
    """Runs cycles in the background and decides on their candidates. The optimizer's learner implements it."""

    async def start(self, settings: dict[str, Any], *, may_loosen_bars: bool = False) -> Cycle:
        """Create a cycle's row and start the cycle.

        Raises:
            CycleInProgress: another cycle is running.
            ValueError: invalid settings, thresholds of the release gate below the operator's configuration without
                `may_loosen_bars`, or too few trajectories to learn from.
        """
        ...

    async def check(self, settings: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the needs of a cycle with these settings and their current amounts; starts nothing.

        Raises:
            ValueError: invalid settings.
        """
        ...

    async def resume(self) -> None:
        """Resume the cycle that an earlier process left open, if there is one."""
        ...

    async def stop(self) -> None:
        """Interrupt the running cycle; it is resumed at the next start."""
        ...

    async def cancel(self, cycle_id: str) -> Cycle:
        """Stop a running cycle; it closes with the error that it was cancelled."""
        ...

    async def decide_again(self, policy: Policy) -> dict[str, Any]:
        """Decide on a cycle's candidate by tasks that no earlier decision on it used; return the verdict.

        Raises:
            CycleInProgress: held-out tasks would have to be played while a cycle plays.
        """
        ...


@dataclass
class Services:
    """The parts of a running server."""

    memory: Memory
    agent: Agent
    engine: Engine
    hotswap: HotSwap
    cycles: CycleRunner
    environments: Mapping[str, Environment] = field(default_factory=dict)
    toolbox: Toolbox | None = None
    """Opened before the engine starts, closed before it stops; None offers no tools."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    preparations: PreparationLimit = field(default_factory=PreparationLimit)
    embeddings: ConcurrencyLimit = field(
        default_factory=lambda: ConcurrencyLimit(MAX_EMBEDDING_REQUESTS, holder="the encoder")
    )
    encoder_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held for each batch of an embedding request: requests wait here in turn, and not in threads."""
    maintenance: Maintenance | None = None
    """None if the engine is never stopped for maintenance."""
    server: ServerConfig = field(default_factory=ServerConfig)
    """Address, allowed hosts and origins."""
    check_training: Callable[[], Awaitable[HealthCheck]] | None = None
    """Checks whether the hardware has capacity for training; None if this process runs no cycles."""

    def require_serving(self) -> None:
        """Raise EngineInMaintenance while the engine is stopped for maintenance."""
        if self.maintenance is not None:
            self.maintenance.require_serving()

    def environment(self, name: str) -> Environment:
        """Return the environment called `name`. Raises: UnknownEnvironment."""
        return find_environment(self.environments, name)


async def get_services(request: Request) -> Services:  # asynchronous, because FastAPI runs plain functions in a thread
    return request.app.state.services


Server = Annotated[Services, Depends(get_services)]
"""Injects the services: `async def route(server: Server)`."""
