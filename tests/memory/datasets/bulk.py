"""Writes many episodes in bulk, for tests and the benchmark of exports."""

from __future__ import annotations

from sqlalchemy import insert

from memory.records.policies import Policies
from memory.schema import Reward, RewardSource, Split, Step, StepKind, Trajectory, TrajectoryStage, new_id, now
from memory.storage.database import Database

STEPS_PER_EPISODE = 20
WORDS = "You are in a kitchen, and there is a fridge. " * 8
CALL = {"id": "call_0", "type": "function", "function": {"name": "act", "arguments": '{"command": "open fridge"}'}}
OPENING = [{"role": "system", "content": "You cook."}, {"role": "user", "content": "Make a meal."}]


async def store_episodes(database: Database, num_episodes: int, *, tenant: str = "", token_ids: int = 100) -> None:
    """Store successes of `STEPS_PER_EPISODE` steps each."""
    await Policies(database).register_base("pocket")
    for start in range(0, num_episodes, 500):
        trajectories, steps, rewards = [], [], []
        for number in range(start, min(start + 500, num_episodes)):
            trajectory_id = new_id("trj")
            trajectories.append(
                Trajectory(
                    id=trajectory_id,
                    episode_id=new_id("epi"),
                    tenant=tenant,
                    policy=0,
                    environment="kitchen",
                    task=str(number),
                    kind="cooking",
                    split=Split.PRACTICE,
                    stage=TrajectoryStage.FINISHED,
                    opening=OPENING,
                    num_steps=STEPS_PER_EPISODE,
                    closed_at=now(),
                ).model_dump()
            )
            steps += [make_step(trajectory_id, position, token_ids) for position in range(STEPS_PER_EPISODE)]
            rewards.append(
                Reward(
                    id=new_id("rew"), trajectory_id=trajectory_id, value=1.0, source=RewardSource.ENVIRONMENT
                ).model_dump()
            )

        def write(session, trajectories=trajectories, steps=steps, rewards=rewards) -> None:
            for table, rows in ((Trajectory, trajectories), (Step, steps), (Reward, rewards)):
                session.execute(insert(table), rows)

        await database.write(write)


def make_step(trajectory_id: str, position: int, token_ids: int) -> dict:
    """Return a step: alternately a model call, with its token ids, and a tool result."""
    step = {"trajectory_id": trajectory_id, "position": position, "created_at": now()}
    if position % 2:
        return step | {
            "kind": StepKind.TOOL,
            "content": WORDS,
            "tool_call_id": "call_0",
            "tool_calls": [],
            "prompt_token_ids": None,
            "output_token_ids": None,
            "seconds": 0.0,
        }
    return step | {
        "kind": StepKind.MODEL,
        "content": "I look.",
        "tool_call_id": None,
        "tool_calls": [CALL],
        "prompt_token_ids": [7] * token_ids,
        "output_token_ids": [8] * 10,
        "seconds": 0.1,
    }
