"""Runs learning cycles in the background, one at a time.

Invariants: a cycle that a stop interrupts is resumed at the next start; release decisions are made one after another,
because the second must see which held-out tasks the first has used.
Hazard: loading this module is cheap, running a cycle imports Transformers for its tokenizers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from memory.errors import CycleInProgress
from memory.schema import Cycle, Policy
from memory.store import Memory
from optimizer.config import OptimizerConfig

if TYPE_CHECKING:
    from optimizer.seams import Seams


class Overlay(Protocol):
    """Returns the configuration with the changes of a request, which come from `origin`.

    Raises ValueError, which names a bad key.
    """

    def __call__(self, settings: OptimizerConfig, changes: Mapping[str, Any], *, origin: str) -> OptimizerConfig: ...


LIVE_TRAFFIC = {"environment": "", "practice_episodes": 0, "explore_episodes": 0}
"""Settings of a cycle that plays nothing."""


class Learner:
    """Starts, resumes, cancels and decides cycles for the API; `serve.py` makes it, `Services.cycles` holds it."""

    def __init__(
        self,
        memory: Memory,
        config: OptimizerConfig,
        seams: Seams,
        *,
        overlay: Overlay,
        environment: str | None = None,
    ) -> None:
        """`environment` is that of cycles for which neither the configuration nor a request names one; None: they play
        nothing, and learn from live traffic."""
        self._memory = memory
        self._config = config
        self._overlay = overlay
        self._default_environment = environment
        self._seams = seams
        self._running: asyncio.Task[Any] | None = None
        self._deciding = asyncio.Lock()

    async def start(self, settings: dict[str, Any], *, may_loosen_bars: bool = False) -> Cycle:
        """Open a cycle with these changes to the configuration and run it in the background.

        Raises:
            CycleInProgress: another cycle is running.
            ValueError: bad settings; promotion thresholds looser than the configuration's without `may_loosen_bars`;
                or too few trajectories.
        """
        from optimizer.cycle.cycle import open_cycle
        from optimizer.errors import OptimizerError
        from optimizer.evaluation.bars import require_proof

        try:
            config = self._configure(settings)
            # after the overlay: it is the merged configuration that must not be looser than the server's
            if not may_loosen_bars:
                require_proof(config, self._config)
            # no lock: memory/records/cycles.py refuses a second open cycle within the transaction that would create it
            cycle = await open_cycle(self._memory, config, seams=self._seams)
        except OptimizerError as error:
            raise ValueError(str(error)) from error
        self._run_in_background(cycle.id)
        return cycle

    async def check(self, settings: dict[str, Any]) -> list[dict[str, Any]]:
        """Return what a cycle with these settings needs. Raises ValueError for bad settings."""
        from optimizer.cycle.readiness import measure_needs

        config = self._configure(settings)
        return [need.to_json() for need in await measure_needs(self._memory, config, self._seams)]

    async def resume(self) -> None:
        """Resume the cycle that an earlier process left open, if there is one."""
        cycle = self._memory.cycles.unfinished()
        if cycle is not None:
            self._run_in_background(cycle.id)

    async def cancel(self, cycle_id: str) -> Cycle:
        """Stop a cycle for good; it closes with an error that says so."""
        from optimizer.cycle.cycle import abandon_cycle

        # order: run_cycle must have ended, or its next save would hit a closed row (IllegalMove)
        await self.stop()
        return await abandon_cycle(self._memory, cycle_id, "Cancelled: by request")

    async def decide_again(self, policy: Policy) -> dict[str, Any]:
        """Decide on a cycle's candidate again, on held-out tasks not used for it yet; return the verdict.

        Each threshold is the tighter one of the cycle's settings and of this server's configuration.

        Raises:
            CycleInProgress: held-out tasks would have to be played while a cycle is playing.
        """
        from optimizer.cycle.artifacts import to_json
        from optimizer.cycle.context import CycleContext
        from optimizer.cycle.release_gate import decide_again
        from optimizer.evaluation.bars import tightest

        assert policy.cycle_id is not None, "the route admits only what a cycle made"
        context = CycleContext(self._memory, self._seams, policy.cycle_id)
        # both: the configuration may have been loosened, or tightened, since the cycle was opened
        bars = tightest(context.config.evaluation, self._config.evaluation)
        # this context only; the settings on the cycle's row stay as they were
        context.config = context.config.model_copy(update={"evaluation": bars})
        under_way = self._memory.cycles.unfinished()
        if context.config.environment and under_way is not None:
            raise CycleInProgress(f"cycle {under_way.id!r} is at {under_way.stage!r}: judge again when it has ended")
        # guards decisions against each other only; a cycle plays outside this lock, hence the check above
        async with self._deciding:
            return to_json(await decide_again(context))

    async def stop(self) -> None:
        """Interrupt the running cycle; its row stays open."""
        if self._running is not None:
            # CancelledError is no Exception, so run_cycle does not record it as a failure: the row stays open and the
            # next start resumes it
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)

    def _configure(self, changes: dict[str, Any]) -> OptimizerConfig:
        """Return the configuration with these changes. Raises ValueError for bad settings."""
        is_named = "environment" in changes or "environment" in self._config.model_fields_set
        if not is_named:
            changes = {**self._choose_environment(), **changes}
        return self._overlay(self._config, changes, origin="settings")

    def _choose_environment(self) -> dict[str, Any]:
        """Return the settings of a cycle for which nobody named an environment."""
        name, config = self._default_environment, self._config
        if name is not None and name not in config.learn_from:
            return {"environment": name}
        # what the operator asked for is no default: counts of episodes without an environment are refused
        return {key: value for key, value in LIVE_TRAFFIC.items() if key not in config.model_fields_set}

    def _run_in_background(self, cycle_id: str) -> None:
        from optimizer.cycle.cycle import run_cycle

        # the reference is kept, because the loop itself holds tasks weakly
        self._running = asyncio.create_task(run_cycle(self._memory, cycle_id, seams=self._seams))
        # A cycle records its own failure; retrieving the exception keeps asyncio from logging it again.
        self._running.add_done_callback(lambda cycle: cycle.cancelled() or cycle.exception())
