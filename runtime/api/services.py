"""What the routes are given to work with, and how a route asks for it.

Refuses to know how any of it was made, and knows nothing of the optimizer: a cycle is something that can be started.
Invariant: routes keep no state of their own; everything they change is a row.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol

from fastapi import Depends, Request

from memory.schema import Cycle, Policy
from memory.store import Memory
from runtime.agent.graph import Agent
from runtime.api.gateway.preparation_limit import PreparationLimit
from runtime.config import LimitsConfig, ServerConfig
from runtime.doctor import Check
from runtime.engine.process import Engine
from runtime.environments.base import Environment
from runtime.errors import UnknownEnvironment
from runtime.serving.hotswap import HotSwap
from runtime.serving.maintenance import Maintenance
from runtime.tools.toolbox import Toolbox


class CycleStarter(Protocol):
    """Whoever can turn the loop once, in the background, and judge what came of it."""

    async def start(self, settings: dict[str, Any], *, may_loosen_bars: bool = False) -> Cycle:
        """Open a cycle and set it going.

        Raises:
            CycleInProgress: one is under way.
            ValueError: settings that cannot be, bars of a promotion that are looser than the operator's configuration
                without `may_loosen_bars`, or too few trajectories to learn from.
        """
        ...

    async def check(self, settings: dict[str, Any]) -> list[dict[str, Any]]:
        """Return what a cycle with these settings needs and how much of it there is; nothing is started.

        Raises:
            ValueError: settings that cannot be.
        """
        ...

    async def resume(self) -> None:
        """Resume the cycle that an earlier process left open, if there is one."""
        ...

    async def stop(self) -> None:
        """Interrupt the running cycle; it is resumed at the next start."""
        ...

    async def cancel(self, cycle_id: str) -> Cycle:
        """Stop a cycle that is under way; it closes with an error that says so."""
        ...

    async def judge(self, policy: Policy) -> dict[str, Any]:
        """Settle a cycle's candidate on tasks that have not decided on it yet; return the verdict.

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
    cycles: CycleStarter
    environments: Mapping[str, Environment] = field(default_factory=dict)
    toolbox: Toolbox | None = None
    """Opened before the engine starts, closed before it stops."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    preparations: PreparationLimit = field(default_factory=PreparationLimit)
    maintenance: Maintenance | None = None
    """None: the engine is never stopped on purpose."""
    server: ServerConfig = field(default_factory=ServerConfig)
    """Who may reach the server, and from where."""
    check_training: Callable[[], Awaitable[Check]] | None = None
    """Says whether a cycle would find room to train; None: nobody here trains."""

    def require_serving(self) -> None:
        """Raise EngineInMaintenance while the engine is stopped on purpose."""
        if self.maintenance is not None:
            self.maintenance.require_serving()

    def environment(self, name: str) -> Environment:
        """Return the environment called `name`.

        Raises:
            UnknownEnvironment: there is none; the message lists those there are.
        """
        if name not in self.environments:
            known = ", ".join(sorted(self.environments)) or "none"
            raise UnknownEnvironment(f"no environment is called {name!r}; there is: {known}")
        return self.environments[name]


async def services_of(request: Request) -> Services:  # asynchronous, or FastAPI would ask it in a thread
    return request.app.state.services


Server = Annotated[Services, Depends(services_of)]
"""Ask for the services: `async def route(server: Server)`."""
