"""Everything a stage of a cycle works with: memory, the seams, the settings, the artifacts, and the pool of episodes.

Invariants: the settings are those the cycle was opened with, also after a restart with another configuration.
`artifacts` equals the artifacts on the cycle's row: it is read once, and each write goes to the row first.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from memory.datasets.examples import TaughtExample, user_texts_of
from memory.formats.content import ExampleKind
from memory.held_out import is_held_out_by_clients
from memory.names import path_below
from memory.records.feedback import Correction
from memory.schema import Split, Task, Trajectory, TrajectoryStage, now
from memory.store import Memory
from optimizer.config import OptimizerConfig
from optimizer.cycle.artifacts import CycleArtifacts, to_json
from optimizer.rewards import GradedTrajectory, grade
from optimizer.seams import Played, Seams, Serving, play_all

PROGRESS_INTERVAL_SECONDS = 0.5

WithTrajectory = TypeVar("WithTrajectory", GradedTrajectory, Correction)


@dataclass
class CycleContext:
    """One cycle that is running, or that is looked at after it has closed."""

    memory: Memory
    seams: Seams
    cycle_id: str
    config: OptimizerConfig = field(init=False)
    artifacts: CycleArtifacts = field(init=False)
    stage: str = field(init=False)
    """The position of the cycle: the stage it has entered. The row is the only other copy, and is written first."""
    settings: dict[str, Any] = field(init=False)
    """As stored on the row."""
    opened_at: datetime = field(init=False)
    _progress_saved_at: float = 0.0

    def __post_init__(self) -> None:
        row = self.memory.cycles.get(self.cycle_id)
        # the settings of the row, not those of the server: a cycle keeps its own across a restart
        self.config = OptimizerConfig.model_validate(row.settings)
        self.artifacts = CycleArtifacts.read(row.artifacts)
        self.stage, self.settings, self.opened_at = row.stage, row.settings, row.created_at

    @property
    def directory(self) -> Path:
        """The directory of this cycle's rows, checkpoints and cell results."""
        # path_below, here and in the next two: a name from a row or a request must not lead out of the data directory
        return path_below(self.memory.data_dir, "cycles", self.cycle_id)

    def adapter_directory(self, version: int) -> Path:
        """Return the directory of a policy version's adapter, whether it exists yet or not."""
        return path_below(self.memory.data_dir, "adapters", f"{self.config.name}-v{version}")

    @property
    def reports(self) -> Path:
        return path_below(self.memory.data_dir, "reports", self.cycle_id)

    async def save_artifacts(self, **artifacts: object) -> None:
        """Add artifacts to the row, under their stored names; a repeated stage reads them there.

        Raises:
            TypeError: no artifact has that name.
        """
        for name, artifact in artifacts.items():
            CycleArtifacts.require_readable(name, artifact)
        stored = {name: to_json(artifact) for name, artifact in artifacts.items()}
        # the row first: a failed write must not leave an artifact that only this process knows
        row = await self.memory.cycles.save(self.cycle_id, artifacts=stored)
        self.artifacts = CycleArtifacts.read(row.artifacts)

    async def enter(self, stage: str) -> None:
        """Move the cycle to a stage. A process that dies after this resumes there."""
        progress = {"stage": stage, "done": 0, "total": 0, "message": ""}
        # one write for both, so that people never see the progress of another stage
        await self.memory.cycles.save(self.cycle_id, stage=stage, progress=progress)
        self.stage = stage

    async def add_seconds(self, stage: str, seconds: float) -> None:
        """Add to the time that a stage has taken; what a process took that died in it is not counted."""
        before = self.artifacts.stage_seconds
        await self.save_artifacts(stage_seconds={**before, stage: round(before.get(stage, 0.0) + seconds, 1)})

    async def report_progress(self, done: int, total: int, message: str) -> None:
        """Show how far the stage is; calls in quick succession are dropped, but never the last of a count."""
        now = time.monotonic()
        # each report is a transaction; hundreds of episodes may end within a second
        if done < total and now - self._progress_saved_at < PROGRESS_INTERVAL_SECONDS:
            return
        self._progress_saved_at = now
        progress = {"stage": self.stage, "done": done, "total": total, "message": message}
        await self.memory.cycles.save(self.cycle_id, progress=progress)

    def seed(self, *names: object) -> int:
        """Return a seed that depends only on the configured seed, the cycle and `names`."""
        # a string seeds Random by its digest; hash() would change with every process
        # the labels are part of the seed: rewording one gives a resumed cycle other episodes
        return random.Random(f"{self.config.seed}/{self.cycle_id}/{names}").getrandbits(31)

    async def read_pool(
        self,
        *,
        this_cycle_only: bool = False,
        any_environment: bool = False,
        is_for_weights: bool = True,
        with_branches: bool = False,
    ) -> list[GradedTrajectory]:
        """Return the episodes that may be learned from, oldest first, without held-out tasks.

        Weights are proved by the gate of this cycle, so they learn only from episodes of its own environments, and from
        rewards of those who may teach. Insights have scopes of their own: with `any_environment` and
        `is_for_weights=False` all episodes are returned. Branches are among them only `with_branches`.
        """
        since = self.opened_at if this_cycle_only else None
        environments = None if any_environment else self.config.pool_environments
        graded = await asyncio.to_thread(
            grade,
            self.memory,
            since=since,
            environments=environments,
            limit=self.config.max_pool,
            is_for_weights=is_for_weights,
            with_branches=with_branches,
        )
        # after the limit, so fewer than max_pool may be left
        return await self._drop_held_out(graded)

    async def read_corrections(self) -> list[Correction]:
        """Return the corrections of replies in this cycle's environments by those who may teach the weights, without
        held-out tasks."""
        corrections = await asyncio.to_thread(
            self.memory.feedback.corrections,
            limit=self.config.max_pool,
            environments=self.config.pool_environments,
            is_for_weights=True,
        )
        return await self._drop_held_out(corrections)

    async def read_examples(self) -> dict[ExampleKind, list[TaughtExample]]:
        """Return the imported examples for this cycle's environments by those who may teach the weights, by kind,
        without held-out tasks."""

        def read(kind: ExampleKind) -> list[TaughtExample]:
            environments = self.config.pool_environments
            return self.memory.examples.learnable(kind, environments=environments, limit=self.config.max_pool)

        examples = {kind: await asyncio.to_thread(read, kind) for kind in ExampleKind}
        if not any(examples.values()):
            return {}
        measures = await self._find_measuring()

        def is_held_out(each: TaughtExample) -> bool:
            row = each.example
            return measures(row.tenant, row.environment or None, row.task, user_texts_of(row))

        return {kind: [each for each in rows if not is_held_out(each)] for kind, rows in examples.items()}

    def key_names(self) -> dict[str, str]:
        """Return the names of API keys by their ids."""
        return {key.id: key.name for key in self.memory.keys.select()}

    async def _drop_held_out(self, candidates: list[WithTrajectory]) -> list[WithTrajectory]:
        """Leave out tries of tasks that measure, also those that were played without being marked as held out."""
        measures = await self._find_measuring()

        def is_held_out(trajectory: Trajectory) -> bool:
            return measures(trajectory.tenant, trajectory.environment, trajectory.task, [trajectory.task_text])

        return [each for each in candidates if not is_held_out(each.trajectory)]

    async def _find_measuring(self) -> Callable[[str, str | None, str | None, Sequence[str]], bool]:
        """Return whether a task measures, as a function of (tenant, environment, task, texts of users). Practice tasks
        that choose among the policies of this cycle do, once they were chosen."""
        held_out_by_clients = await asyncio.to_thread(self.memory.trajectories.held_out_tasks)
        choosing = set(self.artifacts.selection_tasks or ())

        def measures(tenant: str, environment: str | None, task: str | None, texts: Sequence[str]) -> bool:
            if choosing & self.tasks_of(environment, task, texts):
                return True
            # live traffic has no environment: it is held out by what its clients named
            if is_held_out_by_clients(held_out_by_clients, tenant, environment, task, texts):
                return True
            # a client may play a held-out task without marking it; a row of a published test set may have no name
            return any(
                self.seams.holds_out(each, task if each == environment else None, texts)
                for each in filter(None, self.config.pool_environments)
            )

        return measures

    def tasks_of(self, environment: str | None, task: str | None, texts: Sequence[str]) -> set[str]:
        """Return the tasks of this cycle's environment that an episode or a row may be of."""
        if not environment or environment != self.config.environment:
            return set()
        return set(self.seams.find_tasks(environment, task or None, texts))

    def is_success(self, trajectory: Trajectory) -> bool:
        """Whether a closed episode reached the reward of a success."""
        reward = self.memory.trajectories.reward_for_weights(trajectory.id)
        return reward is not None and reward >= self.memory.trajectories.success_reward

    def practice_tasks(self) -> list[Task]:
        """Return this cycle's practice tasks."""
        return self.take_practice(self.config.num_practice_tasks, self.artifacts.practice_offset or 0)

    def take_practice(self, num_tasks: int, offset: int) -> list[Task]:
        """Return the block of practice tasks that starts at `offset`; it wraps around after the last task."""
        return self._take_block(self.config.environment, Split.PRACTICE, num_tasks, offset)

    def held_out_tasks(self) -> list[Task]:
        """Return the tasks that decide in this cycle; none where only clients can play."""
        if not self.config.environment:
            return []
        return self.take_held_out(self.config.environment, self.artifacts.held_out_offset)

    def take_held_out(self, environment: str, offset: int) -> list[Task]:
        """Return the block of held-out tasks that starts at `offset`; it wraps around after the last task."""
        return self._take_block(environment, Split.HELD_OUT, self.num_gate_tasks(environment), offset)

    def _take_block(self, environment: str, split: Split, num_tasks: int, offset: int) -> list[Task]:
        tasks = self.seams.tasks(environment, split, offset + num_tasks, 0)
        # where the environment has fewer than offset + num_tasks, earlier blocks are played again
        return [tasks[(offset + number) % len(tasks)] for number in range(min(num_tasks, len(tasks)))]

    def gate_serving(self, environment: str) -> Serving:
        """Return how the gate plays: as users are served, except where `evaluation` sets something else."""
        served, wanted = self.seams.serving(environment), self.config.evaluation
        return Serving(
            served.temperature if wanted.temperature is None else wanted.temperature, wanted.serve_with_memory
        )

    def is_sampled(self, environment: str) -> bool:
        return self.gate_serving(environment).temperature > 0

    def num_gate_tasks(self, environment: str) -> int:
        """Return how many tasks the gate plays in an environment."""
        return self.config.evaluation.count_tasks(self.seams.serving(environment).temperature)

    async def prepare(self, tasks: Sequence[Task]) -> None:
        """Make tasks ready to start, and show the progress of it."""
        if not tasks:
            return
        loop = asyncio.get_running_loop()
        reports: set[asyncio.Task[None]] = set()  # the loop keeps only weak references to tasks

        # create_task is not thread-safe: `prepare` must call this on the loop's thread
        def on_progress(done: int, total: int) -> None:
            task = loop.create_task(self.report_progress(done, total, "preparing tasks"))
            reports.add(task)
            task.add_done_callback(reports.discard)

        await self.seams.prepare(tasks, on_progress)
        # a report that landed later would replace the progress of the episodes
        await asyncio.gather(*reports)

    async def play(
        self,
        tasks: Sequence[Task],
        *,
        policy: int,
        use_memory: bool,
        temperature: float,
        label: str,
        keeps_logprobs: bool = False,
    ) -> list[Trajectory]:
        """Play every task once, at most `concurrency` at a time; `label` makes the seeds of this round its own. What an
        interrupted round has finished is returned and not played again."""
        finished = await self._find_finished(tasks, policy, label)
        left, missing = Counter(each.task for each in finished), list[tuple[int, Task]]()
        for position, task in enumerate(tasks):
            if left[task.name]:
                left[task.name] -= 1
            else:
                missing.append((position, task))
        # which positions were finished is not known: what a repeated round adds must be other samples
        repeated = (len(finished),) if finished else ()

        async def play_one(position: int, task: Task) -> Trajectory:
            return await self.seams.rollout(
                task,
                policy=policy,
                use_memory=use_memory,
                temperature=temperature,
                seed=self.seed(label, position, *repeated),
                keeps_logprobs=keeps_logprobs,
            )

        return finished + await self.play_all([partial(play_one, *each) for each in missing], label)

    async def _find_finished(self, tasks: Sequence[Task], policy: int, label: str) -> list[Trajectory]:
        """Return the episodes of these tasks that this round finished before it was interrupted, oldest first; at most
        as many of a task as it is to be played."""
        begun = self.artifacts.rounds_begun.get(label)
        if begun is None:
            # before the first episode
            all_begun = {**self.artifacts.rounds_begun, label: now()}
            await self.save_artifacts(rounds_begun={name: at.isoformat() for name, at in all_begun.items()})
            return []
        # rounds follow each other, so the policy played nothing else of its cycle in the meantime
        views = await asyncio.to_thread(
            self.memory.trajectories.select,
            limit=self.config.max_pool,
            environment=self.config.environment,
            policy=policy,
            stage=TrajectoryStage.FINISHED,
            since=begun,
        )
        wanted, finished = Counter(task.name for task in tasks), list[Trajectory]()
        for trajectory in (view.trajectory for view in reversed(views)):
            if trajectory.branch_of is None and wanted[trajectory.task or ""]:
                wanted[trajectory.task or ""] -= 1
                finished.append(trajectory)
        return finished

    async def play_all(self, episodes: Sequence[Callable[[], Awaitable[Played]]], label: str) -> list[Played]:
        """Await every episode, as many at a time as is configured, and show the progress of it."""
        return await play_all(
            episodes, concurrency=self.config.concurrency, label=label, on_progress=self.report_progress
        )
