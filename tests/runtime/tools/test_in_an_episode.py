"""Tools that misbehave, in a whole episode: a typed result, never an exception out of it."""

from __future__ import annotations

import sys
import time

import pytest

from memory.schema import StepKind, TrajectoryStage
from memory.store import Memory
from runtime.agent.graph import Agent
from runtime.serving.hotswap import HotSwap
from runtime.tools.functions import tool_from_function
from tests.runtime.fake_engine import FakeEngine, Reply, call
from tests.support.rollouts import play


def raises() -> str:
    """Raise."""
    raise ZeroDivisionError("by zero")


def hangs() -> str:
    """Hang."""
    time.sleep(5)
    return ""


def floods() -> str:
    """Flood."""
    return "x" * 5_000_000


def returns_bytes() -> bytes:
    """Return bytes."""
    return b"\xff"


async def leaves() -> str:
    """Try to end the server."""
    sys.exit(1)


@pytest.mark.parametrize(
    ("function", "heard"),
    [
        (raises, "Error: ZeroDivisionError: by zero"),
        (hangs, "Error: TimeoutError: 'hangs' gave no result within 0.2 seconds"),
        (floods, "[4980000 more characters were cut]"),
        (returns_bytes, "Error: the result is 1 bytes, not text"),
        (leaves, "Error: the tool raised SystemExit"),
    ],
)
async def test_a_tool_that_misbehaves_is_a_result_and_the_episode_goes_on(
    memory: Memory, hotswap: HotSwap, fake: FakeEngine, function, heard: str
):
    fake.script = lambda request: (
        Reply("I see.") if request["messages"][-1]["role"] == "tool" else call(function.__name__)
    )
    agent = Agent(memory, hotswap, {}, tools=[tool_from_function(function, timeout_seconds=0.2)])
    trajectory = await play(agent, messages=[{"role": "user", "content": "try"}])
    assert (trajectory.stage, trajectory.answer) == (TrajectoryStage.FINISHED, "I see.")
    (step,) = [step for step in memory.trajectories.steps(trajectory.id) if step.kind is StepKind.TOOL]
    assert step.content.endswith(heard)
    assert (step.error is None) == (function is floods)
