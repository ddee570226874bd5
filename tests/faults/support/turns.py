"""Repeats every change of the active policy: log an episode, train, promote, activate, at times roll back.

Each turn continues from the state that the one before it left, in this process or in one that was killed.
"""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

from memory.adapters import Manifest, verify_adapter, write_adapter_atomically
from memory.schema import (
    CycleStage,
    Policy,
    PolicyStage,
    RewardSource,
    Step,
    StepKind,
    Trajectory,
    TrajectoryStage,
    new_id,
)
from memory.store import Memory
from optimizer.config import OptimizerConfig
from optimizer.cycle import stages
from optimizer.cycle.artifacts import RowsSummary
from optimizer.cycle.context import CycleContext
from optimizer.cycle.methods import METHODS
from optimizer.seams import Seams
from optimizer.training.launch import read_finished
from optimizer.training.spec import TrainingSpec
from runtime.config import EngineConfig
from runtime.engine.process import Engine
from runtime.serving import hotswap
from runtime.serving.hotswap import HotSwap
from tests.faults.support.children import Tell
from tests.faults.support.points import Point, die_at
from tests.memory.episodes import PATIENT, HashingEncoder
from tests.runtime.conftest import write_adapter

MAX_RANK = 32


class Turns:
    """An open memory, and a swap on an engine that outlives this process."""

    def __init__(self, memory: Memory, engine: Engine, base_dir: Path, tell: Tell) -> None:
        self.memory, self.engine, self.base_dir, self.tell = memory, engine, base_dir, tell
        self.hotswap = HotSwap(memory.policies, engine, max_lora_rank=MAX_RANK)

    async def act(self) -> int:
        """Answer with the active policy, loaded and probed; return its version."""
        async with self.hotswap.lease() as leased:
            await leased.complete([{"role": "user", "content": "hi"}])
            return leased.version

    async def turn(self) -> None:
        await self.log()
        policy = await self.learn()
        await self.memory.policies.promote(policy.version)
        self.announce()
        await self.hotswap.activate(policy.version)
        if policy.version % 2 == 0:
            back = await self.memory.policies.rollback()
            self.announce()
            await self.hotswap.activate(back.version)

    async def log(self) -> None:
        """Store a successful episode of two steps."""
        trajectories = self.memory.trajectories
        trajectory = await trajectories.open(Trajectory(id=new_id("trj"), episode_id=new_id("eps"), policy=0))
        for position in range(2):
            step = Step(trajectory_id=trajectory.id, position=position, kind=StepKind.TOOL, content="dusty " * 500)
            await trajectories.append(step, trajectory=trajectory)
        await trajectories.close(trajectory.id, stage=TrajectoryStage.FINISHED, answer="done")
        await trajectories.reward(trajectory.id, 1.0, RewardSource.USER)
        self.tell("logged", trajectory.id)

    async def learn(self) -> Policy:
        """Train in the cycle that a killed process left open, or in a new one; return the candidate."""
        cycles, config = self.memory.cycles, OptimizerConfig().model_dump(mode="json")
        cycle = cycles.unfinished() or await cycles.open(config)
        seams = Seams(rollout=_never, tasks=_never, train=self.train)
        context = CycleContext(self.memory, seams, cycle.id)
        context.directory.mkdir(parents=True, exist_ok=True)
        (context.directory / "demonstrations.jsonl").write_text('{"input_ids": [1, 2]}\n')
        await context.save_artifacts(demonstrations=RowsSummary(num_rows=1))
        await stages.train(context, METHODS[0])
        version = await stages.nominate(context)
        await cycles.save(cycle.id, stage=CycleStage.COMPLETED)
        return self.memory.policies.get(version)

    async def train(self, spec: TrainingSpec, *, on_step: Any = None, num_attempts: int = 2) -> Manifest:
        """Stand in for the trainer: return a finished adapter, or write one."""
        if (made := read_finished(spec)) is not None:
            return made
        unfinished = spec.work_dir / "adapter"
        shutil.rmtree(unfinished, ignore_errors=True)
        settings = {**spec.settings(), "spec_digest": spec.digest()}
        write_adapter(unfinished, self.base_dir, spec.version, name=spec.name, settings=settings)
        write_adapter_atomically(unfinished, spec.output_dir)
        return read_finished(spec)

    def announce(self) -> None:
        """Report the active policy and the number of activations."""
        self.tell("active", len(self.memory.policies.activations()), self.memory.policies.active().version)

    def flaws(self) -> list[str]:
        """Return the flaws of the database and its activations. Raises if an adapter is damaged."""
        policies = self.memory.policies
        found = list(self.memory.database.check())
        if policies.activations()[-1].version != policies.active().version:
            found.append("the last activation is not of the policy that acts")
        if [policy.stage for policy in policies.select()].count(PolicyStage.ACTIVE) != 1:
            found.append("not one policy acts")
        for policy in policies.select():
            if policy.adapter_path is not None:
                verify_adapter(Path(policy.adapter_path), base_digest=self.base_digest, max_rank=MAX_RANK)
        return found

    @property
    def base_digest(self) -> str:
        return hotswap.digest_base(self.base_dir)


async def boot(tell: Tell, data_dir: Path, base_dir: Path, engine_url: str) -> Turns:
    """Open the data directory as a server does."""
    memory = Memory.open(data_dir, PATIENT, encoder=HashingEncoder())
    await memory.trajectories.close_orphans()
    engine = Engine(EngineConfig(url=engine_url), data_dir)
    await engine.start()
    await memory.policies.register_base(str(base_dir))
    return Turns(memory, engine, base_dir, tell)


def turn_until_killed(
    tell: Tell, data_dir: Path, base_dir: Path, engine_url: str, point: Point, num_passes: int
) -> None:
    """Boot, then run turns until the process dies at the point."""
    hotswap.NUM_IDLE_KEPT = 0  # so that each swap unloads an adapter

    async def run() -> None:
        begin = die_at(point, num_passes)
        turns = await boot(tell, data_dir, base_dir, engine_url)
        begin()
        while True:
            await turns.turn()

    asyncio.run(run())


def _never(*arguments: Any, **more: Any) -> Any:
    raise AssertionError("nothing is played here")
