"""Search: the real agent replays real episodes, and only the engine and the trainer are fakes.

One step decides each task, and many irrelevant ones follow, so that whole episodes do not show which step it was.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import serve
from memory.adapters import read_manifest
from memory.datasets.exports import ExportContent, ExportQuery
from memory.errors import ReplayMismatch
from memory.schema import RewardSource, Split, StepKind, Task, Trajectory, TrajectoryStage
from memory.store import Memory
from optimizer.config import OptimizerConfig
from optimizer.cycle.cycle import open_cycle, run_cycle
from optimizer.cycle.readiness import measure_needs
from optimizer.data.preferences import build_preferences
from optimizer.data.rows import read_rows
from optimizer.errors import CannotReplay
from optimizer.rewards import grade
from optimizer.seams import Seams
from optimizer.training.launch import read_finished
from runtime.agent.graph import Agent
from runtime.config import AgentConfig
from runtime.engine.model_families import POCKET_MODEL
from runtime.environments.base import Environment, Outcome, Playthrough
from runtime.tools.base import Tool
from tests.loop.test_loop import Cook
from tests.optimizer.worlds import ACT
from tests.runtime.conftest import write_adapter
from tests.runtime.fake_engine import Reply, call
from tests.support.played_engine import serve_played, tokenizer
from tests.support.rollouts import play

__all__ = ["tokenizer"]

FIRST_HELD_OUT = 500
NUM_STEPS_AFTER = 7
"""With so many steps between the decision and the end, a loss is no evidence against any single step."""
NUM_POINTS, NUM_WAYS, NUM_ROLLOUTS = 6, 3, 2
CONFIG = OptimizerConfig.model_validate(
    {
        **{"environment": "vault", "methods": ["search"], "num_practice_tasks": 8, "num_selection_tasks": 0},
        **{"practice_episodes": 8, "explore_episodes": 0, "concurrency": 4},
        "branches": {
            **{"num_tasks": 6, "num_tries": 2, "min_rows": 2},
            **{"num_points": NUM_POINTS, "num_ways": NUM_WAYS, "num_rollouts": NUM_ROLLOUTS},
        },
        "demonstrations": {"min_rows": 2},
        "evaluation": {"num_tasks": 16, "min_tasks": 16, "num_sealed_tasks": 0},
    }
)


class Died(BaseException):
    """Simulates the death of the process: no code may catch it."""


class Vault(Environment):
    """Two doors, of which the red one leads to the gold; the steps behind both look the same."""

    name = "vault"
    system_prompt = "You explore."
    temperature = 0.0

    def __init__(self) -> None:
        self.num_started = 0
        self.fickle: set[str] = set()
        """Tasks whose first tool result differs at each start."""
        self.fails_at: set[int] = set()
        """Numbers of the starts that fail."""

    def task(self, name: str) -> Task:
        split = Split.PRACTICE if int(name) < FIRST_HELD_OUT else Split.HELD_OUT
        return Task(environment=self.name, name=name, kind="exploring", split=split)

    def tasks(self, split: Split, num_tasks: int, *, offset: int = 0) -> list[Task]:
        start = offset + (0 if split is Split.PRACTICE else FIRST_HELD_OUT)
        return [self.task(str(number)) for number in range(start, start + num_tasks)]

    async def start(self, task: Task) -> Playthrough:
        self.num_started += 1
        if self.num_started in self.fails_at:
            raise OSError("the vault is shut")
        return Walk(task, f" (visit {self.num_started})" if task.name in self.fickle else "")


class Walk(Playthrough):
    """One vault in progress."""

    def __init__(self, task: Task, mark: str) -> None:
        self.task, self.task_text, self.mark = task, f"Find the gold of vault {task.name}.", mark
        self.door, self.num_closed = "", 0
        self.tools = [Tool("act", "Do one thing.", ACT["function"]["parameters"], self.act)]

    async def act(self, arguments: dict[str, Any]) -> str:
        verb, _, what = arguments["command"].partition(" ")
        if verb == "look":
            return f"Doors: red and blue.{self.mark}"
        if verb == "open":
            self.door = what
            return "The door is open. Behind it: 0"
        if int(what) < NUM_STEPS_AFTER:
            return f"Dark. Behind it: {what}"
        self.is_done = True
        self.closing_text = "Gold!" if self.door == "red" else "Dust."
        return self.closing_text

    async def close(self) -> Outcome:
        self.num_closed += 1
        assert self.num_closed == 1
        return Outcome(float(self.closing_text == "Gold!"), self.closing_text)


class Explorer(Cook):
    """The base opens the red door of a vault every second time; an adapter opens the door that it was taught."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self.num_opened: Counter[str] = Counter()

    async def reply(self, body: dict[str, Any]) -> Reply:
        seen = body["messages"][-1]["content"]
        if body["messages"][-1]["role"] != "tool":
            return call("act", command="look")
        if seen.startswith("Doors"):
            return call("act", command=f"open {self.choose_door(body)}")
        return call("act", command=f"go {int(seen.split()[-1]) + 1}")

    def choose_door(self, body: dict[str, Any]) -> str:
        taught = ""
        if body["model"] in self.adapters:
            taught = read_manifest(self.adapters[body["model"]]).settings["taught"]
        if taught or body["temperature"] == 0:
            return taught or "blue"
        task = next(message["content"] for message in body["messages"] if message["role"] == "user")
        self.num_opened[task] += 1
        return "red" if self.num_opened[task] % 2 else "blue"


class DoorTrainer:
    """The fake at the trainer's seam. SFT changes nothing; search teaches the preferred door."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.rows: dict[str, list[dict[str, Any]]] = {}

    async def __call__(self, spec: Any, *, on_step: Any = None, num_attempts: int = 2) -> Any:
        self.rows[spec.kind] = read_rows(spec.rows_path)
        seen: Counter[str] = Counter()
        for row in self.rows[spec.kind]:
            seen.update(re.findall(r"open (\w+)", self.tokenizer.decode(row.get("chosen_ids", []))))
        for each in [*(spec.at(early) for early in spec.early_adapters), spec]:
            told = {key: getattr(each, key) for key in ("name", "kind", "parent", "trajectory_ids")}
            taught = seen.most_common(1)[0][0] if seen else ""
            told["settings"] = {**each.settings(), "spec_digest": each.digest(), "taught": taught}
            told["metrics"] = {"num_steps": 1, "seconds": 0.1}
            write_adapter(each.output_dir, POCKET_MODEL, each.version, **told)
        return read_finished(spec)


@dataclass
class World:
    """All parts of the server, on a fake engine."""

    memory: Memory
    agent: Agent
    vault: Vault
    trainer: DoorTrainer
    seams: Seams

    async def learn(self, config: OptimizerConfig = CONFIG) -> str:
        """Run a cycle to its end; return its id."""
        cycle = await open_cycle(self.memory, config)
        await run_cycle(self.memory, cycle.id, seams=self.seams)
        return cycle.id

    def branches(self) -> list[Trajectory]:
        return [it for it in self.episodes() if it.branch_of is not None]

    def episodes(self) -> list[Trajectory]:
        views = self.memory.trajectories.select(limit=10_000, environment="vault", split=Split.PRACTICE)
        return [view.trajectory for view in reversed(views)]

    def report(self, cycle_id: str) -> str:
        return (self.memory.data_dir / "reports" / cycle_id / "report.md").read_text()


@pytest.fixture
async def world(tmp_path: Path, tokenizer: Any) -> AsyncIterator[World]:
    vault, trainer = Vault(), DoorTrainer(tokenizer)
    async with serve_played(tmp_path / "data", Explorer(tokenizer)) as (memory, engine, hotswap):
        agent = Agent(memory, hotswap, {"vault": vault}, AgentConfig(max_steps=12))
        composed = serve.make_seams(agent, engine, SimpleNamespace(window=None), None)  # pyright: ignore
        default = Seams(rollout=composed.rollout, tasks=composed.tasks)
        kept = {name: getattr(default, name) for name in ("inspect_hardware", "open_window")}
        yield World(memory, agent, vault, trainer, replace(composed, train=trainer, **kept))


async def branch_at(world: World, origin: Trajectory, position: int, seed: int = 0) -> Trajectory:
    return await world.agent.branch(origin, position=position, temperature=1.0, seed=seed)


async def test_a_branch_replays_the_beginning_and_plays_on_to_a_reward_of_its_own(world: World):
    origin = await play(world.agent, world.vault.task("1"), policy=0, temperature=0.0, use_memory=False)
    steps = world.memory.trajectories.steps(origin.id)

    branches = [await branch_at(world, origin, 2, seed) for seed in range(8)]

    doors = {world.memory.trajectories.effective_reward(it.id): it.answer for it in branches}
    assert doors == {1.0: "Gold!", 0.0: "Dust."}
    branch, own = branches[0], world.memory.trajectories.steps(branches[0].id)
    assert (branch.branch_of, branch.branch_position, branch.stage) == (origin.id, 2, TrajectoryStage.FINISHED)
    assert [(it.kind, it.content) for it in own[:2]] == [(it.kind, it.content) for it in steps[:2]]
    assert own[2].prompt_token_ids == steps[2].prompt_token_ids  # the same tokens after the replay
    # replayed tokens are not counted again
    assert own[0].prompt_token_ids is None and own[0].output_token_ids is None
    assert branch.prompt_tokens == sum(len(it.prompt_token_ids or ()) for it in own[2:]) < origin.prompt_tokens
    assert world.vault.num_started == 9


async def test_a_branch_has_what_is_left_of_the_budget_and_belongs_to_whom_its_origin_does(world: World):
    task = world.vault.task("1")
    who = {"tenant": "acme", "user_id": "jane", "is_shared": True}
    origin = await play(world.agent, task, policy=0, temperature=0.0, use_memory=False, **who)
    world.agent._config = AgentConfig(max_steps=4)

    branch = await branch_at(world, origin, 6)

    kinds = Counter(step.kind for step in world.memory.trajectories.steps(branch.id))
    assert kinds[StepKind.MODEL] == 4 and "no answer within 4 steps" in (branch.error or "")
    assert {name: getattr(branch, name) for name in who} == who and branch.split is Split.PRACTICE


async def test_a_replay_that_differs_is_told_and_leaves_no_record(world: World):
    world.vault.fickle.add("1")
    origin = await play(world.agent, world.vault.task("1"), policy=0, temperature=0.0, use_memory=False)

    with pytest.raises(ReplayMismatch, match=r"step 1 of the task '1': 'act' answers .*visit 2.*answered .*visit 1"):
        await branch_at(world, origin, 2)

    assert [it.id for it in world.episodes()] == [origin.id]


async def test_a_branch_is_evidence_for_nothing_else(world: World):
    origin = await play(world.agent, world.vault.task("1"), policy=0, temperature=0.0, use_memory=False)
    branches = [await branch_at(world, origin, 2, seed) for seed in range(8)]
    await world.memory.index.drain()

    learnable = world.memory.trajectories.learnable()
    assert [each.trajectory.id for each in learnable] == [origin.id]
    assert world.memory.trajectories.count_learnable() == {"vault": 1}
    assert len(grade(world.memory, with_branches=True)) == 9
    for content, num_rows in ((ExportContent.LABELS, 1), (ExportContent.TRAJECTORIES, 9)):
        pages = world.memory.exports.read(ExportQuery(content))
        assert sum(len(row.contents) for page in pages for row in page) == num_rows
    shown = await play(world.agent, world.vault.task("2"), policy=0, temperature=0.0, use_memory=True)
    assert any(it.answer == "Gold!" for it in branches) and shown.memory_ids == []
    await world.memory.trajectories.reward(branches[0].id, 1.0, RewardSource.USER)
    assert [each.trajectory.id for each in world.memory.trajectories.learnable()] == [origin.id, shown.id]


async def test_search_finds_the_step_that_decides_where_whole_episodes_do_not(world: World, tokenizer: Any):
    cycle_id = await world.learn(CONFIG.model_copy(update={"methods": ["sft", "search"]}))

    own = [each for each in grade(world.memory, environment="vault") if each.trajectory.policy == 1]
    assert {each.is_success for each in own} == {True, False}
    whole = build_preferences(own, tokenizer, config=CONFIG.preferences, max_length_tokens=4096)
    assert whole.rows == [] and whole.counts["no_evidence"] > 0

    rows = world.trainer.rows["search"]
    assert len(rows) == NUM_POINTS
    by_id = {it.id: it for it in world.episodes()}
    for row in rows:
        assert tokenizer.decode(row["chosen_ids"]).count("open red") == 1
        assert tokenizer.decode(row["rejected_ids"]).count("open blue") == 1
        assert set(row["chosen_mask"]) == set(row["rejected_mask"]) == {1}
        for side in ("chosen", "rejected"):
            branch = by_id[row[f"{side}_trajectory_id"]]
            step = world.memory.trajectories.steps(branch.id)[branch.branch_position]
            origin_step = world.memory.trajectories.steps(branch.branch_of)[branch.branch_position]
            assert row["prompt_ids"] == step.prompt_token_ids == origin_step.prompt_token_ids
            assert row[f"{side}_ids"] == step.output_token_ids
    verdict = world.memory.cycles.get(cycle_id).verdict
    assert verdict["decision"] == "promote" and world.memory.policies.active().parent == 1
    lineage = read_manifest(Path(world.memory.policies.active().adapter_path)).trajectory_ids
    assert {by_id[row["chosen_trajectory_id"]].branch_of for row in rows} <= set(lineage)


async def test_the_budget_holds_and_is_told_before_anything_is_played(world: World):
    needs = {need.name: need for need in await measure_needs(world.memory, CONFIG, world.seams)}
    assert "plays 12 own episodes and at most 36 branches" in needs["branches"].detail
    assert "48 episodes at the most in all" in needs["branches"].detail and needs["replay"].is_met
    assert world.vault.num_started == 0

    cycle_id = await world.learn()

    summary = world.memory.cycles.get(cycle_id).artifacts["branches"]
    assert summary["num_branches"] == len(world.branches()) <= NUM_POINTS * NUM_WAYS * NUM_ROLLOUTS
    assert len(world.episodes()) - len(world.branches()) == CONFIG.practice_episodes + 12
    at_points = Counter((it.branch_of, it.branch_position) for it in world.branches())
    firsts = {key: number for key, number in at_points.items() if key[0] not in {it.id for it in world.branches()}}
    assert len(firsts) == summary["num_points"] == NUM_POINTS and set(firsts.values()) == {NUM_WAYS}
    # two of the three ways are equal: the different one is played once more
    assert summary["num_branches"] == NUM_POINTS * (NUM_WAYS + 1) and summary["num_rows"] == NUM_POINTS
    assert f"{summary['num_branches']} branches at {summary['num_points']} steps" in world.report(cycle_id)


async def test_a_point_that_cannot_be_replayed_is_dropped_and_counted(world: World):
    world.vault.fickle = {str(number) for number in range(0, 8, 2)}

    cycle_id = await world.learn()

    artifacts = world.memory.cycles.get(cycle_id).artifacts
    points = artifacts["branch_points"]["search"]
    dropped = [it for it in points if it["mismatch"]]
    fickle = {it.id for it in world.episodes() if it.task in world.vault.fickle}
    # before the first call of a task there is no tool result that could differ
    assert dropped and all(it["trajectory_id"] in fickle and "visit" in it["mismatch"] for it in dropped)
    assert artifacts["branches"]["num_mismatches"] == len(dropped)
    assert not {it.branch_of for it in world.branches()} & {it["trajectory_id"] for it in dropped}
    assert f"{len(dropped)} of these steps were dropped" in world.report(cycle_id)


async def test_a_start_that_fails_costs_one_branch_and_not_the_cycle(world: World):
    num_own = CONFIG.practice_episodes + 12
    world.vault.fails_at = {num_own + 2}

    cycle_id = await world.learn()

    (failed,) = [it for it in world.branches() if it.stage is TrajectoryStage.FAILED]
    assert failed.error == "OSError: the vault is shut" and world.memory.trajectories.steps(failed.id) == []
    assert world.memory.cycles.get(cycle_id).stage == "completed"
    assert world.memory.cycles.get(cycle_id).artifacts["branches"]["num_branches"] == len(world.branches()) - 1


async def test_a_process_that_dies_within_a_search_plays_nothing_twice(world: World):
    cycle = await open_cycle(world.memory, CONFIG)
    num_left, branching = [7], world.seams.branching

    def dying(environment: str):
        branch = branching(environment)

        async def play_one(origin, **how):
            if num_left[0] == 0:
                raise Died
            num_left[0] -= 1
            return await branch(origin, **how)

        return play_one

    with pytest.raises(BaseException) as raised:
        await run_cycle(world.memory, cycle.id, seams=replace(world.seams, branching=dying))
    assert isinstance(raised.value, Died | BaseExceptionGroup)
    await world.memory.trajectories.close_orphans()
    before = {it.id for it in world.episodes() if it.stage is TrajectoryStage.FINISHED}
    assert {it.id for it in world.branches()} & before

    await run_cycle(world.memory, cycle.id, seams=world.seams)

    finished = [it for it in world.episodes() if it.stage is TrajectoryStage.FINISHED]
    assert before < {it.id for it in finished}
    assert sum(it.branch_of is None for it in finished) == CONFIG.practice_episodes + 12
    roots = {it.id for it in finished if it.branch_of is None}
    at_points = Counter((it.branch_of, it.branch_position) for it in finished if it.branch_of in roots)
    assert set(at_points.values()) == {NUM_WAYS}
    assert len(at_points) == len(world.memory.cycles.get(cycle.id).artifacts["branch_points"]["search"])


async def test_an_environment_that_cannot_be_replayed_is_refused_by_name(world: World):
    world.vault.can_replay = False

    with pytest.raises(CannotReplay, match="Search replays episodes of 'vault', which does not start again"):
        await open_cycle(world.memory, CONFIG, seams=world.seams)
    cycle = await open_cycle(world.memory, CONFIG)
    with pytest.raises(CannotReplay, match="'vault'"):
        await run_cycle(world.memory, cycle.id, seams=world.seams)

    assert world.vault.num_started == 0 and world.episodes() == []
    with pytest.raises(ValueError, match=r"\['search'\].*name an environment"):
        OptimizerConfig(environment="", practice_episodes=0, explore_episodes=0, methods=["search"])
