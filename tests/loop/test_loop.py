"""The whole loop: request -> reward -> cycle -> swap, and the second answer differs because of the first.

First with a fake engine and a fake trainer, both scripted in this file; then on the real engine with the pocket model,
real games and real trainers. Nothing else is faked: SQLite, the agent's graph, the cycle's graph, the gate and the swap
are those of production.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web
from rich.console import Console

import serve
from memory import adapters
from memory.adapters import Manifest, read_manifest
from memory.records.insights import InsightOperation, OperationKind
from memory.schema import Cycle, CycleStage, Feedback, Policy, PolicyStage, Split, Task, Trajectory, TrajectoryStage
from memory.store import Memory
from optimizer.config import DemonstrationConfig, EvaluationConfig, OptimizerConfig
from optimizer.cycle.artifacts import DecidedVerdict
from optimizer.cycle.cycle import open_cycle, run_cycle
from optimizer.data.demonstrations import build_demonstrations
from optimizer.data.rows import read_rows
from optimizer.data.stitching import render_prompt, stitch
from optimizer.errors import TooFewTrajectories
from optimizer.evaluation.cells import Cell, CellResult, play_cell
from optimizer.evaluation.decision import Decision, decide
from optimizer.rewards import grade
from optimizer.seams import Seams
from optimizer.training.launch import read_finished
from runtime.agent.graph import Agent
from runtime.api.services import Services
from runtime.cli import server_process
from runtime.cli.render import Phases
from runtime.config import AgentConfig
from runtime.engine.model_families import POCKET_MODEL
from runtime.environments.base import Environment, Outcome, Playthrough
from runtime.serving.hotswap import LEAST_CHANGE_NATS, TOLERANCE_NATS, HotSwap, mean_distance
from runtime.tools.base import Tool
from tests.memory.episodes import PATIENT, HashingEncoder
from tests.optimizer.worlds import ACT, say
from tests.runtime.conftest import write_adapter
from tests.runtime.fake_engine import FakeEngine, Reply, call
from tests.support.played_engine import serve_played, tokenizer
from tests.support.rollouts import play

__all__ = ["tokenizer"]

FOODS = ("carrot", "onion", "banana", "pork", "pepper", "salmon", "apple", "egg")
FIRST_HELD_OUT = 500
HELD_MEAL = "499"
LUCKY = 0  # a seed with which a sampled episode takes the stove
BY_HAND = OptimizerConfig.model_validate(
    {
        **{
            "environment": "kitchen",
            "num_practice_tasks": 12,
            "practice_episodes": 24,
            "explore_episodes": 12,
            "num_selection_tasks": 0,
        },
        "demonstrations": {"min_rows": 4},
        "preferences": {"min_rows": 4},
        "evaluation": {"num_tasks": 16, "min_tasks": 16},
    }
)
FROM_ONE_EPISODE = BY_HAND.model_copy(
    update={"practice_episodes": 0, "explore_episodes": 0, "demonstrations": DemonstrationConfig(min_rows=1)}
)


class Kitchen(Environment):
    """Meals by number: read the cookbook, then fry the food that it names, on the stove."""

    name = "kitchen"
    system_prompt = "You cook."

    def task(self, name: str) -> Task:
        split = Split.PRACTICE if int(name) < FIRST_HELD_OUT else Split.HELD_OUT
        return Task(environment=self.name, name=name, kind="cooking", split=split)

    def tasks(self, environment: str, split: Split, num_tasks: int, offset: int = 0) -> list[Task]:
        start = offset + (0 if split is Split.PRACTICE else FIRST_HELD_OUT)
        return [self.task(str(number)) for number in range(start, start + num_tasks)]

    async def start(self, task: Task) -> Playthrough:
        return Meal(task)


class Meal(Playthrough):
    """One meal in progress."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.task_text = f"Make meal {task.name}."
        self.tools = [Tool("act", "Do one thing.", ACT["function"]["parameters"], self.act)]

    async def act(self, arguments: dict[str, Any]) -> str:
        food = FOODS[int(self.task.name) % len(FOODS)]
        if arguments["command"] == "read cookbook":
            return f"Directions:\nfry the {food}"
        self.is_done = True
        self.closing_text = "It sizzles." if arguments["command"] == f"cook {food} with stove" else "It burns."
        return self.closing_text

    async def close(self) -> Outcome:
        return Outcome(float(self.closing_text == "It sizzles."), self.closing_text)


class Cook(FakeEngine):
    """A scripted engine. Its base takes the oven unless the seed or memory says otherwise; an adapter does as taught.

    The base uses memory at even meals only, so that something is left to learn. Token ids are those of the pocket
    model's tokenizer, so that episodes can be trained on.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(self.reply, base_dir=POCKET_MODEL)
        self.tokenizer = tokenizer
        self.may_go_on = asyncio.Event()
        """Until it is set, meal `HELD_MEAL` waits before its last command."""

    async def reply(self, body: dict[str, Any]) -> Reply:
        asked = next(message["content"] for message in body["messages"] if message["role"] == "user")
        number = re.search(r"Make meal (\d+)\.$", asked)[1]
        if body["messages"][-1]["role"] != "tool":
            return call("act", command="read cookbook")
        if number == HELD_MEAL:
            await self.may_go_on.wait()
        food = body["messages"][-1]["content"].split()[-1]
        return call("act", command=f"cook {food} with {self.choose(body, asked, int(number))}")

    def choose(self, body: dict[str, Any], asked: str, number: int) -> str:
        if body["model"] in self.adapters:
            return read_manifest(self.adapters[body["model"]]).settings["taught"]
        is_told = "with stove" in asked and number % 2 == 0
        is_lucky = body["temperature"] > 0 and body["seed"] % 2 == 1
        return "stove" if is_told or is_lucky else "oven"

    def _answer(self, body: dict[str, Any], reply: Reply) -> web.Response:
        answer = json.loads(super()._answer(body, reply).text)
        said = say(json.loads(reply.calls[0][1])["command"]) + "<|im_end|>"
        answer["choices"][0]["token_ids"] = self.tokenizer(said, add_special_tokens=False)["input_ids"]
        answer["prompt_token_ids"] = render_prompt(self.tokenizer, body["messages"], body["tools"])
        return web.json_response(answer)


class QuickTrainer:
    """The fake at the trainer's seam: its adapter takes the appliance most frequent in its rows, or `planted`."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.planted: str | None = None

    async def __call__(self, spec, *, on_step=None, num_attempts: int = 2) -> Manifest:
        seen: Counter[str] = Counter()
        for row in read_rows(spec.rows_path):
            ids, mask = ("input_ids", "mask") if spec.kind == "sft" else ("chosen_ids", "chosen_mask")
            own = [token for token, is_own in zip(row[ids], row[mask], strict=True) if is_own]
            seen.update(re.findall(r"with (\w+)", self.tokenizer.decode(own)))
        taught = self.planted or seen.most_common(1)[0][0]
        told = {key: getattr(spec, key) for key in ("name", "kind", "parent", "trajectory_ids")}
        told["settings"] = {**spec.settings(), "spec_digest": spec.digest(), "taught": taught}
        told["metrics"] = {"num_steps": 1, "seconds": 0.1}
        write_adapter(spec.output_dir, POCKET_MODEL, spec.version, **told)
        return read_finished(spec)


@dataclass
class World:
    """All parts of the server, on a fake engine."""

    memory: Memory
    engine: Cook
    hotswap: HotSwap
    agent: Agent
    kitchen: Kitchen
    trainer: QuickTrainer

    async def ask(self, meal: str, **how: Any) -> Trajectory:
        return await play(self.agent, self.kitchen.task(meal), **{"temperature": 0.0, **how})

    def num_steps_so_far(self) -> int:
        views = self.memory.trajectories.select(stage=TrajectoryStage.RUNNING)
        return sum(len(self.memory.trajectories.steps(view.trajectory.id)) for view in views)

    async def turn(self, config: OptimizerConfig) -> DecidedVerdict:
        cycle = await open_cycle(self.memory, config)
        seams = Seams(rollout=partial(play, self.agent), tasks=self.kitchen.tasks, train=self.trainer)
        return await run_cycle(self.memory, cycle.id, seams=seams)


@pytest.fixture
async def world(tmp_path: Path, tokenizer: Any) -> AsyncIterator[World]:
    played, kitchen = Cook(tokenizer), Kitchen()
    async with serve_played(tmp_path / "data", played) as (memory, _, hotswap):
        following = asyncio.create_task(hotswap.follow())
        agent = Agent(memory, hotswap, {"kitchen": kitchen}, AgentConfig(max_steps=4))
        yield World(memory, played, hotswap, agent, kitchen, QuickTrainer(tokenizer))
        await server_process.cancel_and_wait(following)


async def until(holds: Any, seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.01)


async def test_the_second_answer_differs_because_of_the_first(world: World):
    before = await world.ask("1", use_memory=False)
    first = await world.ask("1", temperature=1.0, seed=LUCKY, use_memory=False)
    assert (before.answer, first.answer) == ("It burns.", "It sizzles.")

    verdict = await world.turn(FROM_ONE_EPISODE)
    await until(lambda: world.hotswap.active_version == 1)
    second = await world.ask("1", use_memory=False)

    assert verdict.decision == "promote"
    assert (second.answer, second.policy) == ("It sizzles.", 1)
    learned = read_manifest(Path(world.memory.policies.get(1).adapter_path))
    assert learned.trajectory_ids == [first.id]


async def test_a_win_that_the_user_calls_a_failure_teaches_nothing(world: World):
    first = await world.ask("1", temperature=1.0, seed=LUCKY)
    await world.memory.feedback.post(Feedback(id="fb-1", trajectory_id=first.id, value=False))

    with pytest.raises(TooFewTrajectories, match="1 are missing"):
        await world.turn(FROM_ONE_EPISODE)

    assert (await world.ask("1")).answer == "It burns."


async def test_a_win_is_shown_to_the_next_request_and_changes_its_answer(world: World):
    first = await world.ask("1", temperature=1.0, seed=LUCKY)
    await world.memory.index.drain()

    second = await world.ask("2")

    assert (second.answer, second.memory_ids) == ("It sizzles.", [first.id])
    assert (await world.ask("2", use_memory=False)).answer == "It burns."


async def test_a_better_candidate_takes_over_and_an_episode_under_way_keeps_its_policy(world: World):
    under_way = asyncio.create_task(world.ask(HELD_MEAL))
    await until(lambda: world.num_steps_so_far() == 2)

    verdict = await world.turn(BY_HAND)
    await until(lambda: world.hotswap.active_version == 2)
    new = await world.ask("1", use_memory=False)
    world.engine.may_go_on.set()
    old = await under_way

    assert verdict.decision == "promote" and world.memory.policies.active().version == 2
    assert [policy.stage for policy in world.memory.policies.select()] == ["retired", "draft", "active"]
    assert (new.policy, new.answer) == (2, "It sizzles.")
    assert (old.policy, old.stage, old.answer) == (0, TrajectoryStage.FINISHED, "It burns.")
    models = {body["model"] for body in world.engine.requests if f"meal {HELD_MEAL}." in str(body["messages"])}
    assert models == {"base"}
    assert "fry the _ -> cook _ with stove" in [it.text for it in world.memory.insights.active("kitchen")]


async def test_a_planted_worse_candidate_is_rejected_and_the_incumbent_stays_on(world: World):
    world.trainer.planted = "oven"

    verdict = await world.turn(BY_HAND)

    assert verdict.decision == "reject" and "worse on the same tasks" in verdict.reason
    rejected = world.memory.policies.get(verdict.policy)
    assert (rejected.stage, rejected.verdict["decision"]) == (PolicyStage.REJECTED, "reject")
    assert (world.memory.policies.active().version, world.hotswap.active_version) == (0, 0)
    assert (await world.ask("2")).policy == 0


# The same on the real engine, in this order: each test continues with the memory of the ones before it.

RIGHT = ("fry the _ -> cook _ with stove", "roast the _ -> cook _ with oven")
RIGHT += tuple(f"{cut} the _ -> {cut} _ with knife" for cut in ("chop", "slice", "dice"))
NUM_AT_ONCE = 32
NUM_PRACTICE = 32  # all are played in parallel
SMALL = {
    **{"num_practice_tasks": 24, "practice_episodes": 48, "explore_episodes": 32, "num_selection_tasks": 0},
    "demonstrations": {"min_rows": 8},
    "preferences": {"min_rows": 2},
    "evaluation": {"num_tasks": 16, "min_tasks": 16, "num_sealed_tasks": 8},
    "recipe": {"sft_epochs": 2, "dpo_epochs": 1},
}
CYCLE_SECONDS = 1800
SPOILED_BY = -1.0  # factor on every lora_B: reverses the adapter's effect


@dataclass
class Kept:
    """The system as `serve.py serve` composes it, and the state that tests hand on."""

    services: Services
    practice: list[Task]
    cycle: Cycle | None = None

    @property
    def memory(self) -> Memory:
        return self.services.memory

    async def play(self, name: str, tasks: Sequence[Task], *, policy: int = 0, use_memory: bool = False) -> CellResult:
        """Play greedily, as the release gate does."""
        kept, rollout = self.memory.trajectories, partial(play, self.services.agent)
        return await play_cell(
            Cell(name, policy, use_memory),
            tasks,
            rollout=rollout,
            grade=kept.effective_reward,
            count_model_calls=kept.count_model_calls,
            success_reward=kept.success_reward,
            concurrency=NUM_AT_ONCE,
        )

    def answers(self, result: CellResult) -> list[str | None]:
        return [self.memory.trajectories.get(played.trajectory_id).answer for played in result.played]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def real(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Kept]:
    """The pocket model on the real vLLM, with TextWorld, composed and started by serve.py, but without the API."""
    home = tmp_path_factory.mktemp("loop")
    (home / "ratchet.toml").touch()  # not the user's own settings
    flags = ["--engine.model", "pocket", "--engine.kv_cache_gib", "1", "--engine.startup_seconds", "900"]
    flags += ["--agent.max_output_tokens", "64"]
    settings = serve.read_all_settings(home / "ratchet.toml", {"data": str(home / "data")}, flags)
    phases = Phases(Console(), is_silent=True)
    async with contextlib.AsyncExitStack() as stack:
        memory = stack.enter_context(Memory.open(settings.data, PATIENT, encoder=HashingEncoder()))
        services = serve.compose(settings, memory, phases)
        stack.push_async_callback(services.engine.stop)
        await server_process.start(services, settings, phases)
        watching = [asyncio.create_task(part) for part in (services.engine.watch(), services.hotswap.follow())]
        stack.push_async_callback(server_process.cancel_and_wait, *watching)
        stack.push_async_callback(services.cycles.stop)
        textworld = services.environments["textworld"]
        practice = textworld.tasks(Split.PRACTICE, NUM_PRACTICE)
        await textworld.prepare(practice)
        yield Kept(services, practice)


def on_real_engine(test):
    """Mark a test that shares the module's engine, and so its event loop."""
    return pytest.mark.engine(pytest.mark.asyncio(loop_scope="module")(test))


@on_real_engine
async def test_the_right_insights_change_what_the_pocket_model_does_and_win_more(real: Kept):
    tasks = real.practice[:24]
    without = await real.play("off", tasks)
    operations = [InsightOperation(OperationKind.ADD, "textworld", "cooking", text) for text in RIGHT]
    await real.memory.insights.apply(operations)

    told = await real.play("on", tasks, use_memory=True)

    shown = {real.memory.trajectories.get(played.trajectory_id).memory_text for played in told.played}
    assert all(text in segment for segment in shown for text in RIGHT)
    assert real.answers(told) != real.answers(without)
    print(f"{without.num_successes} of {len(tasks)} won without memory, {told.num_successes} with it")
    assert told.num_successes > without.num_successes


@on_real_engine
async def test_many_seeded_episodes_at_once_kill_nothing(real: Kept):
    pid = real.services.engine.pid
    played = await asyncio.gather(
        *(
            play(real.services.agent, task, policy=0, temperature=1.0, seed=1000 * number)
            for number, task in enumerate(real.practice[:NUM_AT_ONCE])
        )
    )

    broken = [trajectory.error for trajectory in played if trajectory.stage is not TrajectoryStage.FINISHED]
    assert broken == []
    rewards = [real.memory.trajectories.effective_reward(trajectory.id) for trajectory in played]
    assert all(reward is not None for reward in rewards) and len(set(rewards)) > 1
    assert (real.services.engine.pid, real.services.engine.num_restarts) == (pid, 0)


@on_real_engine
async def test_recorded_tokens_render_again_exactly(real: Kept, tokenizer: Any):
    graded = grade(real.memory, environment="textworld")
    assert any(each.trajectory.memory_text for each in graded)
    as_if_won = [replace(each, is_success=True) for each in graded]  # lost episodes must render again as well
    config = DemonstrationConfig(keep_memory_share=0.0, per_task=1000)

    built = build_demonstrations(as_if_won, tokenizer, config=config, max_length_tokens=2048)

    joints = sum((stitch(each.steps)[1] for each in graded), Counter())
    print(f"{len(built.rows)} rows; joints {dict(joints)}; tally {dict(built.counts)}")
    assert built.rows and built.counts["rerender_mismatch"] == 0
    assert joints["clean"] > 0.95 * joints.total()
    assert built.trained_share == 1.0


@on_real_engine
async def test_a_cycle_of_real_training_ends_with_a_verdict_and_what_it_says_is_so(real: Kept):
    memory, services = real.memory, real.services
    opened = await services.cycles.start(SMALL, may_loosen_bars=True)
    async with asyncio.timeout(CYCLE_SECONDS):
        while memory.cycles.get(opened.id).closed_at is None:
            await asyncio.sleep(0.2)
    cycle = memory.cycles.get(opened.id)

    assert (cycle.stage, cycle.error) == (CycleStage.COMPLETED, None)
    real.cycle, verdict, decision = cycle, cycle.verdict, cycle.verdict["decision"]
    reports = memory.data_dir / "reports" / cycle.id
    assert Path(verdict["report"]) == reports / "report.md"
    assert decision in (reports / "report.md").read_text()
    report = json.loads((reports / "report.json").read_text())
    assert set(report["cells"]) == {"base-off", "base-on", "sft-off", "sft-on", "dpo-off", "dpo-on"}
    assert all(cell["broken_share"] == 0 for cell in report["cells"].values())
    assert (reports / "success.png").stat().st_size > 5000
    print({name: cell["num_successes"] for name, cell in report["cells"].items()}, decision, verdict["reason"])

    sft, candidate = memory.policies.get(1), memory.policies.get(2)
    assert (sft.stage, candidate.parent, verdict["policy"]) == (PolicyStage.DRAFT, 1, 2)
    is_promoted = decision == "promote"
    stages = {"promote": PolicyStage.ACTIVE, "reject": PolicyStage.REJECTED, "uninformative": PolicyStage.CANDIDATE}
    assert candidate.stage is stages[decision]
    assert memory.policies.get(0).stage is (PolicyStage.RETIRED if is_promoted else PolicyStage.ACTIVE)
    await until(lambda: services.hotswap.active_version == memory.policies.active().version)
    again = await play(services.agent, real.practice[0], temperature=0.0)
    assert again.policy == (2 if is_promoted else 0)


@on_real_engine
@pytest.mark.parametrize(("version", "kind"), [(1, "sft"), (2, "dpo")])
async def test_a_trained_adapter_is_on_the_engine_what_it_was_in_the_trainer(real: Kept, version: int, kind: str):
    assert real.cycle is not None, "the cycle did not end"
    engine, policy = real.services.engine, real.memory.policies.get(version)
    manifest = read_manifest(Path(policy.adapter_path))
    fingerprint = manifest.fingerprint
    async with real.services.hotswap.lease(version) as leased:
        served = await engine.client.token_logprobs(leased.served_name, fingerprint.token_ids)
    bare = await engine.client.token_logprobs(engine.model, fingerprint.token_ids)

    assert (manifest.kind, policy.adapter_digest) == (kind, adapters.digest_adapter(Path(policy.adapter_path)))
    assert mean_distance(served, fingerprint.adapter_logprobs) < TOLERANCE_NATS
    assert mean_distance(served, bare) > LEAST_CHANGE_NATS


@on_real_engine
async def test_a_planted_worse_adapter_is_not_promoted(real: Kept):
    assert real.cycle is not None, "the cycle did not end"
    memory, hotswap, active = real.memory, real.services.hotswap, real.memory.policies.active()
    spoiled = await plant_spoiled_copy(memory, memory.policies.get(2))

    incumbent = await real.play("incumbent-off", real.practice, policy=2)
    candidate = await real.play("spoiled-off", real.practice, policy=spoiled.version)
    verdict = decide(candidate, incumbent, EvaluationConfig())

    print(f"{candidate.num_successes} against {incumbent.num_successes}: {verdict.decision}, {verdict.reason}")
    assert candidate.num_successes < incumbent.num_successes
    assert verdict.decision is not Decision.PROMOTE
    settled = await memory.policies.move(spoiled.version, PolicyStage.REJECTED, verdict=verdict.to_json())
    assert settled.stage is PolicyStage.REJECTED
    assert memory.policies.active().version == hotswap.active_version == active.version


async def plant_spoiled_copy(memory: Memory, policy: Policy) -> Policy:
    """Register a candidate with a spoiled copy of a policy's adapter and valid records."""
    original, version = Path(policy.adapter_path), len(memory.policies.select())
    final = original.with_name(f"spoiled-v{version}")
    await asyncio.to_thread(write_spoiled_copy, original, final, version=version, parent=policy.version)
    drafted = await memory.policies.draft(
        adapter_path=str(final), adapter_digest=adapters.digest_adapter(final), parent=policy.version, note="spoiled"
    )
    return await memory.policies.move(drafted.version, PolicyStage.CANDIDATE)


def write_spoiled_copy(original: Path, final: Path, **told: Any) -> None:
    """Write an adapter with every lora_B of the original times `SPOILED_BY`, and a matching manifest."""
    from peft import PeftModel
    from safetensors.numpy import load_file, save_file
    from transformers import AutoModelForCausalLM

    from optimizer.training.child import take_fingerprint

    unfinished = final.with_name(f"unfinished-{final.name}")
    shutil.copytree(original, unfinished, ignore=shutil.ignore_patterns(adapters.MANIFEST_NAME))
    weights = load_file(original / adapters.WEIGHTS_NAME)
    spoiled = {name: SPOILED_BY * it if ".lora_B" in name else it for name, it in weights.items()}
    save_file(spoiled, unfinished / adapters.WEIGHTS_NAME, metadata={"format": "pt"})
    manifest = read_manifest(original)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(POCKET_MODEL), unfinished).eval()
    told |= {"name": "spoiled", "settings": {**manifest.settings, "spoiled_by": SPOILED_BY}}
    told["fingerprint"] = take_fingerprint(model, manifest.fingerprint.token_ids)
    adapters.write_manifest(unfinished, manifest.model_copy(update=told))
    adapters.write_adapter_atomically(unfinished, final)
