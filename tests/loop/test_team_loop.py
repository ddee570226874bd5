"""A team practises, its adapter learns all roles, and the adapter serves a single agent as well as the team."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from memory.schema import Split
from optimizer.data.rows import read_rows
from optimizer.data.stitching import render_prompt
from runtime.agent.graph import Agent
from runtime.agent.team import PLANNER_PROMPT
from runtime.config import AgentConfig
from tests.loop.test_loop import BY_HAND, Cook, Kitchen, QuickTrainer, World
from tests.runtime.fake_engine import Reply
from tests.support.played_engine import serve_played, tokenizer

__all__ = ["tokenizer"]

PLAN = "Read the book, then fry."


class TeamCook(Cook):
    """A cook that also plans, but ignores the plan when it acts."""

    async def reply(self, body: dict[str, Any]) -> Reply:
        if body["messages"][0]["content"] == PLANNER_PROMPT:
            return Reply(PLAN)
        messages = [
            {**each, "content": re.sub(r"\n\nA plan.*", "", each["content"], flags=re.S)} for each in body["messages"]
        ]
        return await super().reply({**body, "messages": messages})

    def _answer(self, body: dict[str, Any], reply: Reply) -> web.Response:
        if reply.calls:
            return super()._answer(body, reply)
        ids = self.tokenizer(f"{reply.content}<|im_end|>", add_special_tokens=False)["input_ids"]
        prompt = render_prompt(self.tokenizer, body["messages"], [])
        choice = {"index": 0, "message": {"role": "assistant", "content": reply.content}, "finish_reason": "stop"}
        return web.json_response({"choices": [choice | {"token_ids": ids}], "prompt_token_ids": prompt})


class ReadingTrainer(QuickTrainer):
    """A trainer that records the texts that its rows train."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self.trained: dict[str, list[str]] = {}

    async def __call__(self, spec, **how: Any):
        rows = read_rows(spec.rows_path)
        ids, mask = ("input_ids", "mask") if spec.kind == "sft" else ("chosen_ids", "chosen_mask")
        self.trained[spec.kind] = [
            self.tokenizer.decode([it for it, own in zip(row[ids], row[mask], strict=True) if own]) for row in rows
        ]
        return await super().__call__(spec, **how)


@pytest.fixture
async def world(tmp_path: Path, tokenizer: Any) -> AsyncIterator[World]:
    played, kitchen = TeamCook(tokenizer), Kitchen()
    async with serve_played(tmp_path / "data", played) as (memory, _, hotswap):
        config = {"max_steps": 6, "team": ["planner", "actor", "checker"], "team_plays": "practice"}
        agent = Agent(memory, hotswap, {"kitchen": kitchen}, AgentConfig.model_validate(config))
        yield World(memory, played, hotswap, agent, kitchen, ReadingTrainer(tokenizer))


async def test_an_adapter_learned_from_a_teams_practice_serves_a_single_agent_and_the_team(world: World):
    verdict = await world.turn(BY_HAND)
    assert verdict.decision == "promote"
    trained = world.trainer.trained["sft"]
    assert sum(PLAN in text for text in trained) >= 4 and sum("with stove" in text for text in trained) >= 4
    assert not any(PLAN in text and "with stove" in text for text in trained)

    views = world.memory.trajectories.select(limit=500)
    by_split: dict[Split, set[int]] = {}
    for view in views:
        steps = world.memory.trajectories.steps(view.trajectory.id, with_token_ids=False)
        by_split.setdefault(view.trajectory.split, set()).add(sum(step.role == "planner" for step in steps))
    assert by_split == {Split.PRACTICE: {1}, Split.HELD_OUT: {0}}

    learned = verdict.policy
    alone = await world.ask("501", use_memory=False, policy=learned)
    as_team = await world.ask("3", use_memory=False, policy=learned)
    assert (alone.answer, as_team.answer) == ("It sizzles.", "It sizzles.")
