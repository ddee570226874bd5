"""What every stage of a cycle works with: memory, the seams, the settings, and a place for what it makes.

Refuses to know what a stage does. The Cycle row is the visible truth: artifacts are kept there, progress is told there.

Invariant: settings are those the cycle was opened with, also after a restart with another configuration.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from memory.names import path_below
from memory.records.feedback import Correction
from memory.schema import Cycle, CycleStage, Split, Task, Trajectory
from optimizer.config import OptimizerConfig
from optimizer.cycle.readiness import count_gate_tasks
from optimizer.rewards import GradedTrajectory, grade
from optimizer.seams import Seams, Serving

PROGRESS_INTERVAL_SECONDS = 0.5

Lived = TypeVar("Lived", GradedTrajectory, Correction)


@dataclass
class CycleContext:
    """One cycle under way."""

    memory: Any
    seams: Seams
    cycle_id: str
    config: OptimizerConfig = field(init=False)
    _told_at: float = 0.0

    def __post_init__(self) -> None:
        self.config = OptimizerConfig.model_validate(self.cycle.settings)

    @property
    def cycle(self) -> Cycle:
        return self.memory.cycles.get(self.cycle_id)

    @property
    def artifacts(self) -> dict[str, Any]:
        return self.cycle.artifacts

    @property
    def directory(self) -> Path:
        """Where rows, checkpoints and cell results of this cycle lie until they are no longer needed."""
        return path_below(self.memory.data_dir, "cycles", self.cycle_id)

    def adapter_directory(self, version: int) -> Path:
        """Return where the adapter of a policy version lies, or will."""
        return path_below(self.memory.data_dir, "adapters", f"{self.config.name}-v{version}")

    @property
    def reports(self) -> Path:
        return path_below(self.memory.data_dir, "reports", self.cycle_id)

    async def keep(self, **artifacts: Any) -> None:
        """Remember what a stage made; a repeated stage finds it here."""
        await self.memory.cycles.save(self.cycle_id, artifacts=artifacts)

    async def enter(self, stage: CycleStage) -> None:
        await self.memory.cycles.save(
            self.cycle_id, stage=stage, progress={"stage": stage.value, "done": 0, "total": 0, "message": ""}
        )

    async def tell(self, done: int, total: int, message: str) -> None:
        """Show how far the stage is; calls in quick succession are dropped, the last of a count never."""
        now = time.monotonic()
        if done < total and now - self._told_at < PROGRESS_INTERVAL_SECONDS:
            return
        self._told_at = now
        progress = {"stage": self.cycle.stage.value, "done": done, "total": total, "message": message}
        await self.memory.cycles.save(self.cycle_id, progress=progress)

    def seed(self, *names: object) -> int:
        """Return a seed that is always the same for the same place in the same cycle."""
        return random.Random(f"{self.config.seed}/{self.cycle_id}/{names}").getrandbits(31)

    async def read_pool(
        self, *, this_cycle_only: bool = False, any_environment: bool = False, is_for_weights: bool = True
    ) -> list[GradedTrajectory]:
        """Return what may be learned from, oldest first; held-out tasks stay out, also when a client asked for one.

        What changes weights must be proved by this cycle's gate, so only episodes of its own environments are read, and
        rewards of those who may teach. `any_environment` and `is_for_weights=False` read all, for words, which have
        scopes of their own.
        """
        since = self.cycle.created_at if this_cycle_only else None
        environments = None if any_environment else self.config.pool_environments
        graded = await asyncio.to_thread(
            grade,
            self.memory,
            since=since,
            environments=environments,
            limit=self.config.max_pool,
            is_for_weights=is_for_weights,
        )
        return await self._drop_held_out(graded)

    async def read_corrections(self) -> list[Correction]:
        """Return what those who may teach the weights said replies of this cycle's environments should have been; of
        held-out tasks none, whoever asked."""
        corrections = await asyncio.to_thread(
            self.memory.feedback.corrections,
            limit=self.config.max_pool,
            environments=self.config.pool_environments,
            is_for_weights=True,
        )
        return await self._drop_held_out(corrections)

    def key_names(self) -> dict[str, str]:
        """Return the names of API keys by their ids."""
        return {key.id: key.name for key in self.memory.keys.select()}

    async def _drop_held_out(self, found: list[Lived]) -> list[Lived]:
        """Leave out tries at a task that measures, though they were not marked so themselves."""
        environments_own = {(task.environment, task.name) for task in self._all_that_measure()}
        clients_own = await asyncio.to_thread(self.memory.trajectories.held_out_tasks)

        def measures(trajectory: Trajectory) -> bool:
            if trajectory.environment is not None:
                return (trajectory.environment, trajectory.task) in environments_own
            return any((trajectory.tenant, it) in clients_own for it in (trajectory.task, trajectory.task_text))

        return [each for each in found if not measures(each.trajectory)]

    def is_success(self, trajectory: Trajectory) -> bool:
        """Whether a closed episode reached the reward of a success."""
        reward = self.memory.trajectories.reward_for_weights(trajectory.id)
        return reward is not None and reward >= self.memory.trajectories.success_reward

    def practice_tasks(self) -> list[Task]:
        """Return this cycle's practice tasks."""
        return self.seams.tasks(
            self.config.environment,
            Split.PRACTICE,
            self.config.num_practice_tasks,
            self.artifacts.get("practice_offset", 0),
        )

    def held_out_tasks(self) -> list[Task]:
        """Return the tasks that decide in this cycle; none where nothing can be played here."""
        if not self.config.environment:
            return []
        return self.take_held_out(self.config.environment, self.artifacts.get("held_out_offset", 0))

    def take_held_out(self, environment: str, offset: int) -> list[Task]:
        """Return the block of held-out tasks that starts at `offset`; behind the last task comes the first again."""
        num_tasks = self.num_gate_tasks(environment)
        known = self.seams.tasks(environment, Split.HELD_OUT, offset + num_tasks, 0)
        return [known[(offset + number) % len(known)] for number in range(min(num_tasks, len(known)))]

    def gate_serving(self, environment: str) -> Serving:
        """Return how the gate plays: as users are served, but for what the settings of the gate say."""
        served, wanted = self.seams.serving(environment), self.config.evaluation
        return Serving(
            served.temperature if wanted.temperature is None else wanted.temperature, wanted.serve_with_memory
        )

    def is_sampled(self, environment: str) -> bool:
        return self.gate_serving(environment).temperature > 0

    def num_gate_tasks(self, environment: str) -> int:
        """Return how many tasks the gate plays there: half as many where the contestants try each several times."""
        return count_gate_tasks(self.config, self.seams.serving(environment).temperature)

    def _all_that_measure(self) -> list[Task]:
        """Return every held-out task that a gate played or plays, and the sealed ones."""
        tasks: list[Task] = []
        for environment in filter(None, self.config.pool_environments):
            end = self.memory.verdicts.held_out_end(environment) + self.num_gate_tasks(environment)
            tasks += self.seams.tasks(environment, Split.HELD_OUT, end, 0)
            tasks += self.seams.sealed_tasks(environment, self.config.evaluation.num_sealed_tasks)
        return tasks

    async def prepare(self, tasks: Sequence[Task]) -> None:
        """Have tasks ready to start, telling of it."""
        if not tasks:
            return
        loop = asyncio.get_running_loop()
        telling: set[asyncio.Task[None]] = set()

        def on_progress(done: int, total: int) -> None:
            task = loop.create_task(self.tell(done, total, "preparing tasks"))
            telling.add(task)
            task.add_done_callback(telling.discard)

        await self.seams.prepare(tasks, on_progress)
        await asyncio.gather(*telling)

    async def play(
        self, tasks: Sequence[Task], *, policy: int, use_memory: bool, temperature: float, label: str
    ) -> list[Trajectory]:
        """Play every task once, at most `concurrency` at a time; `label` makes the seeds of this round its own."""
        places = asyncio.Semaphore(self.config.concurrency)
        num_done = 0

        async def play_one(position: int, task: Task) -> Trajectory:
            nonlocal num_done
            async with places:
                trajectory = await self.seams.rollout(
                    task,
                    policy=policy,
                    use_memory=use_memory,
                    temperature=temperature,
                    seed=self.seed(label, position),
                )
            num_done += 1
            await self.tell(num_done, len(tasks), label)
            return trajectory

        async with asyncio.TaskGroup() as group:
            playing = [group.create_task(play_one(position, task)) for position, task in enumerate(tasks)]
        return [each.result() for each in playing]
