"""The bars of a cycle by key: only an administrator's key may lower those of the operator."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from memory.schema import CycleStage
from memory.store import Memory
from optimizer.config import OptimizerConfig
from tests.memory.episodes import PATIENT, HashingEncoder
from tests.optimizer.cycle.test_release_gate import World, candidate_always, reach_the_gate
from tests.runtime.api.worlds import ServedWorld
from tests.support.learners import make_learner

NO_BARS = {"margin": -1.5, "min_tasks": 1, "num_tasks": 2, "false_promotion_rate": 0.49}
# Learns from logged episodes, of which there are none: a cycle with valid settings is refused for that.
LOGGED = OptimizerConfig(environment="kitchen", practice_episodes=0, explore_episodes=0)

Start = Callable[[str, dict[str, Any]], httpx.Response]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a cycle of the real learner over HTTP, with a key of one scope."""
    world = ServedWorld(tmp_path / "data")
    world.learner = make_learner(world.memory, LOGGED, World(world.memory).seams)
    keys = {}
    for scope in ("admin", "learn"):
        keys[scope] = asyncio.run(world.memory.keys.create(scope, [scope]))[1]

    def start(scope: str, settings: dict[str, Any]) -> httpx.Response:
        headers = {"Authorization": f"Bearer {keys[scope]}"}
        with httpx.Client(base_url=world.url, trust_env=False, timeout=20, headers=headers) as http:
            return http.post("/v1/cycles", json={"settings": settings})

    with world:
        yield start


@pytest.mark.parametrize("name", NO_BARS)
def test_a_learn_key_cannot_lower_a_bar(start: Start, name: str):
    answer = start("learn", {"evaluation": {name: NO_BARS[name]}})
    assert answer.status_code == 400, answer.text
    message = answer.json()["error"]["message"]
    bar = getattr(LOGGED.evaluation, name)
    assert f"evaluation.{name} = {NO_BARS[name]!r}" in message and repr(bar) in message


def test_a_learn_key_may_raise_a_bar_and_an_administrators_may_lower_it(start: Start):
    for scope, settings in (("learn", {"evaluation": {"margin": 0.1}}), ("admin", {"evaluation": NO_BARS})):
        message = start(scope, settings).json()["error"]["message"]
        assert "are needed" in message and "bar" not in message


@pytest.mark.parametrize("other", ["garden", ""])
def test_a_learn_key_cannot_choose_what_a_promotion_is_decided_by(start: Start, other: str):
    answer = start("learn", {"environment": other})
    message = answer.json()["error"]["message"]
    assert answer.status_code == 400 and f"environment = {other!r} is not 'kitchen'" in message, answer.text
    assert "are needed" in start("learn", {"environment": "kitchen"}).json()["error"]["message"]
    assert "is not 'kitchen'" not in start("admin", {"environment": other}).text


def test_a_learn_key_cannot_name_a_directory_outside(start: Start, tmp_path: Path):
    victim = tmp_path / "outside" / "victim-v1"
    victim.mkdir(parents=True)
    answer = start("learn", {"name": "../../outside/victim"})
    assert answer.status_code == 400 and "is not a name" in answer.json()["error"]["message"]
    assert victim.is_dir()


async def test_a_cycle_with_lower_bars_is_judged_by_the_operators(tmp_path: Path):
    with Memory.open(tmp_path / "data", PATIENT, encoder=HashingEncoder()) as memory:
        await memory.policies.register_base("base")
        world = World(memory)
        world.wins = candidate_always
        config = OptimizerConfig(environment="kitchen", evaluation=NO_BARS)
        context = await reach_the_gate(world, config)
        await memory.cycles.save(context.cycle_id, stage=CycleStage.COMPLETED)
        operator = OptimizerConfig(
            environment="kitchen", evaluation={"num_tasks": 12, "min_tasks": 50, "num_sealed_tasks": 0, "floor": 0.0}
        )
        candidate = memory.policies.get(context.artifacts.candidate)

        verdict = await make_learner(memory, operator, world.seams).decide_again(candidate)

        assert verdict["decision"] == "uninformative" and "50 are needed" in verdict["reason"]
        assert memory.policies.active().version == 0


@pytest.mark.parametrize(
    ("environment", "changes", "is_played"),
    [
        ("kitchen", {}, True),
        (None, {}, False),
        (None, {"environment": "kitchen"}, True),
        ("kitchen", {"environment": "", "practice_episodes": 0, "explore_episodes": 0}, False),
    ],
)
async def test_a_cycle_that_names_no_environment_takes_the_servers(
    tmp_path: Path, environment: str | None, changes: dict[str, Any], is_played: bool
):
    with Memory.open(tmp_path / "data", PATIENT, encoder=HashingEncoder()) as memory:
        await memory.policies.register_base("base")
        learner = make_learner(memory, OptimizerConfig(), World(memory).seams, environment=environment)

        needs = await learner.check(changes)

        said = " ".join(need["detail"] for need in needs)
        assert ("'kitchen' are played" in said, "clients play them" in said) == (is_played, not is_played)
        mends = " ".join(need["mend"] for need in needs)
        assert ("name an environment to practise in" in mends) == (not is_played)


async def test_a_server_without_an_environment_cannot_practise(tmp_path: Path):
    with Memory.open(tmp_path / "data", PATIENT, encoder=HashingEncoder()) as memory:
        learner = make_learner(memory, OptimizerConfig(), World(memory).seams)
        with pytest.raises(ValueError, match="without an environment: name one"):
            await learner.check({"practice_episodes": 64})


@pytest.mark.parametrize(
    ("configured", "message"),
    [
        ({"practice_episodes": 64}, "without an environment: name one"),
        ({"learn_from": ["kitchen"], "explore_episodes": 64}, "without an environment: name one"),
    ],
)
async def test_what_the_operator_wants_played_is_not_dropped_for_want_of_an_environment(
    tmp_path: Path, configured: dict[str, Any], message: str
):
    with Memory.open(tmp_path / "data", PATIENT, encoder=HashingEncoder()) as memory:
        name = "kitchen" if "learn_from" in configured else None
        learner = make_learner(memory, OptimizerConfig(**configured), World(memory).seams, environment=name)
        with pytest.raises(ValueError, match=message):
            await learner.check({})


async def test_an_environment_that_is_learned_from_besides_is_not_the_one_that_is_played(tmp_path: Path):
    with Memory.open(tmp_path / "data", PATIENT, encoder=HashingEncoder()) as memory:
        await memory.policies.register_base("base")
        config = OptimizerConfig(learn_from=["kitchen"])
        learner = make_learner(memory, config, World(memory).seams, environment="kitchen")
        assert "clients play them" in " ".join(need["detail"] for need in await learner.check({}))
