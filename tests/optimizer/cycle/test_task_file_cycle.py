"""A whole cycle on a task file of function calls: practice, training, gate and sealed tasks, on a fake engine."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

import serve
from memory.adapters import Manifest
from memory.datasets.examples import Origin
from memory.formats.content import ExampleContent, ExampleKind
from memory.schema import Split
from memory.store import Memory
from optimizer.config import OptimizerConfig
from optimizer.cycle.context import CycleContext
from optimizer.cycle.cycle import open_cycle, run_cycle
from optimizer.data.stitching import render_prompt
from optimizer.seams import Seams, find_no_gpu
from optimizer.training.launch import read_finished
from runtime.agent.graph import Agent
from runtime.cli.server_process import cancel_and_wait
from runtime.config import AgentConfig, EngineConfig, EnvironmentConfig
from runtime.engine.process import Engine
from runtime.environments.registry import open_environments
from runtime.maintenance import Maintenance
from runtime.serving.hotswap import HotSwap
from tests.memory.episodes import PATIENT, HashingEncoder
from tests.runtime.conftest import write_adapter
from tests.runtime.fake_engine import FakeEngine, Reply

COLORS = ("red", "green", "blue")
NUM_TASKS = {"practice": 12, "held-out": 30, "sealed": 6}
CONFIG = OptimizerConfig.model_validate(
    {
        **{"environment": "paint", "practice_episodes": 30, "explore_episodes": 24, "num_selection_tasks": 8},
        "demonstrations": {"min_rows": 4},
        "preferences": {"min_rows": 4},
        "evaluation": {"num_tasks": 200, "min_tasks": 30},
    }
)
PAINT = {
    "name": "paint",
    "description": "Paint the wall.",
    "parameters": {"type": "object", "properties": {"color": {"type": "string"}}, "required": ["color"]},
}


def write_tasks(path: Path) -> Path:
    rows = []
    for split, num_tasks in NUM_TASKS.items():
        for number in range(num_tasks):
            color = COLORS[number % len(COLORS)]
            row = {"name": f"{split}-{number}", "split": split, "kind": "walls"}
            row["messages"] = [{"role": "user", "content": f"Wall {number} of {split}: make it {color}."}]
            row["tools"] = [{"type": "function", "function": PAINT}]
            row["grader"] = {"type": "function_call", "calls": [{"paint": {"color": [color]}}]}
            rows.append(row)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


class Painter(FakeEngine):
    """A scripted engine: its base paints grey unless the seed is lucky, an adapter paints the requested color."""

    def __init__(self, base_dir: Path, tokenizer: Any) -> None:
        super().__init__(self.reply, base_dir=base_dir)
        self.tokenizer = tokenizer

    def reply(self, body: dict[str, Any]) -> Reply:
        asked = next(message["content"] for message in reversed(body["messages"]) if message["role"] == "user")
        is_lucky = body["temperature"] > 0 and body["seed"] % 2 == 1
        color = asked.rpartition(" ")[2].rstrip(".") if body["model"] in self.adapters or is_lucky else "grey"
        return Reply(calls=[("paint", json.dumps({"color": color}))])

    def _answer(self, body: dict[str, Any], reply: Reply) -> web.Response:
        answer = json.loads(super()._answer(body, reply).text)
        said = '<tool_call>\n{"name": "paint", "arguments": ' + reply.calls[0][1] + "}\n</tool_call><|im_end|>"
        answer["choices"][0]["token_ids"] = self.tokenizer(said, add_special_tokens=False)["input_ids"]
        answer["prompt_token_ids"] = render_prompt(self.tokenizer, body["messages"], body["tools"])
        return web.json_response(answer)


@pytest.fixture
async def world(tmp_path: Path, tiny_base: Path, tokenizer: Any) -> AsyncIterator[tuple[Memory, Seams]]:
    """Memory, and the seams that serve.py makes, with a fake trainer."""
    environments = open_environments(
        {"paint": EnvironmentConfig(tasks=write_tasks(tmp_path / "tasks.jsonl"))}, tmp_path / "environments"
    )

    async def train(spec, *, on_step=None, num_attempts: int = 2) -> Manifest:
        told = {key: getattr(spec, key) for key in ("name", "kind", "parent", "trajectory_ids")}
        told |= {
            "settings": {**spec.settings(), "spec_digest": spec.digest()},
            "metrics": {"num_steps": 1, "seconds": 0.1},
        }
        for each in [*(spec.at(early) for early in spec.early_adapters), spec]:
            told["settings"]["spec_digest"] = each.digest()
            write_adapter(each.output_dir, tiny_base, each.version, **told)
        return read_finished(spec)

    with Memory.open(tmp_path / "data", PATIENT, encoder=HashingEncoder()) as memory:
        async with Painter(tiny_base, tokenizer) as played:
            engine = Engine(EngineConfig(url=played.url), memory.data_dir)
            await engine.start()
            await memory.policies.register_base(str(tiny_base))
            hotswap = HotSwap(memory.policies, engine)
            await hotswap.activate(0)
            following = asyncio.create_task(hotswap.follow())
            agent = Agent(memory, hotswap, environments, AgentConfig(max_steps=4))
            maintenance = Maintenance(engine, hotswap, agent.open_episodes, drain_seconds=1)
            seams = serve.make_seams(agent, engine, maintenance, None)
            yield memory, replace(seams, train=train, inspect_hardware=find_no_gpu)
            await cancel_and_wait(following)
            await engine.stop()


async def test_a_cycle_practises_trains_and_proves_on_a_task_file(world: tuple[Memory, Seams]):
    memory, seams = world

    cycle = await open_cycle(memory, CONFIG, seams=seams)
    verdict = await run_cycle(memory, cycle.id, seams=seams)

    assert memory.cycles.get(cycle.id).settings["num_practice_tasks"] == NUM_TASKS["practice"]
    assert (verdict.decision, memory.policies.active().version) == ("promote", verdict.policy)
    played = [view.trajectory for view in memory.trajectories.select(limit=10_000)]
    assert not any(trajectory.error for trajectory in played)
    splits = Counter((trajectory.split, trajectory.task.rpartition("-")[0]) for trajectory in played)
    assert splits[Split.PRACTICE, "practice"] == CONFIG.practice_episodes + CONFIG.explore_episodes
    assert splits[Split.HELD_OUT, "sealed"] == NUM_TASKS["sealed"]
    assert splits[Split.HELD_OUT, "held-out"] % NUM_TASKS["held-out"] == 0
    artifacts = memory.cycles.get(cycle.id).artifacts
    for rows in ("demonstrations", "preferences"):
        learned_from = [memory.trajectories.get(id_) for id_ in artifacts[rows]["trajectory_ids"]]
        assert learned_from and {trajectory.split for trajectory in learned_from} == {Split.PRACTICE}
    assert artifacts["demonstrations"]["trained_share"] == 1.0
    # all practice tasks were practised, so none is left for choosing a checkpoint
    assert artifacts["selection_tasks"] == []


async def test_imported_rows_of_tasks_that_measure_are_not_learned_whatever_they_are_called(
    world: tuple[Memory, Seams],
):
    memory, seams = world

    def example(text: str, answer: str, *, task: str | None = None, before: Sequence[dict] = ()) -> ExampleContent:
        prompt = [*before, {"role": "user", "content": text}]
        return ExampleContent(
            ExampleKind.DEMONSTRATION, [{"role": "assistant", "content": answer}], prompt=prompt, task=task
        )

    held_out, sealed = "Wall 29 of held-out: make it blue.", "Wall 5 of sealed: make it blue."
    practice = "Wall 0 of practice: make it red."
    greeted = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello!"}]
    rows = [
        example(held_out, "no name"),
        example(f" {held_out.replace(' ', '  ')}\n", "other space"),
        example(held_out, "the publisher's name", task="test/29"),
        example(held_out, "a later turn", before=greeted),
        example(sealed, "sealed"),
        example("Make it blue.", "by name", task="held-out-29"),
        ExampleContent(ExampleKind.DEMONSTRATION, [{"role": "assistant", "content": "unasked"}], task="sealed-5"),
        example(practice, "learned"),
        example(held_out, "learned by name", task="practice-0"),  # two tasks may share a text
    ]
    await memory.examples.add(rows, Origin(environment="paint"))
    await memory.examples.add([example(held_out, "of another environment")], Origin(environment="textworld"))
    cycle = await open_cycle(memory, CONFIG.model_copy(update={"learn_from": ["textworld"]}))

    (learned,) = filter(None, (await CycleContext(memory, seams, cycle.id).read_examples()).values())

    answers = [each.example.completion[0]["content"] for each in learned]
    assert answers == ["learned", "learned by name"]
