"""Helpers for tests that create episodes, insight operations and vectors in one line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy

from memory.config import MemoryConfig
from memory.records.insights import InsightOperation, OperationKind, SupportCounts
from memory.schema import RewardSource, Split, Step, StepKind, Trajectory, TrajectoryStage, new_id
from memory.store import Memory

DIM = 128
MAX_WORDS = 64
# Deadlines are for users; a busy machine must not change what a test finds.
PATIENT = MemoryConfig(retrieval_deadline_seconds=60, encoding_deadline_seconds=120)


class HashingEncoder:
    """A fake encoder: texts that share words have similar vectors. It counts its calls."""

    def __init__(self, name: str = "hashing") -> None:
        self.name = name
        self.num_calls = 0

    def encode(self, texts: Sequence[str]) -> numpy.ndarray:
        self.num_calls += 1
        vectors = numpy.zeros((len(texts), DIM), dtype="float32")
        for row, text in enumerate(texts):
            for word in text.lower().split():
                vectors[row, int(hashlib.md5(word.encode()).hexdigest(), 16) % DIM] += 1.0
            vectors[row, 0] += 0.01
        return vectors / numpy.linalg.norm(vectors, axis=1, keepdims=True)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(text.split()) for text in texts]

    def max_tokens(self) -> int:
        return MAX_WORDS


def command_call(command: str) -> dict:
    """Return a tool call in the form of an engine."""
    arguments = json.dumps({"command": command})
    return {"id": new_id("call"), "type": "function", "function": {"name": "act", "arguments": arguments}}


async def open_trajectory(memory: Memory, **fields) -> Trajectory:
    await memory.policies.register_base(memory.policies.find_base_model() or "pocket")
    values = {
        "id": new_id("trj"),
        "episode_id": new_id("epi"),
        "policy": 0,
        "environment": "kitchen",
        "kind": "cooking",
    }
    return await memory.trajectories.open(Trajectory(**values | fields))


async def play(
    memory: Memory,
    *commands: str,
    reward: float | None = 1.0,
    stage: TrajectoryStage = TrajectoryStage.FINISHED,
    split: Split = Split.PRACTICE,
    **fields,
) -> Trajectory:
    """Store one whole episode: each command is a model step and a tool step."""
    trajectory = await open_trajectory(memory, split=split, **fields)
    position = 0
    for command in commands or ("look",):
        for step in (
            Step(
                trajectory_id=trajectory.id,
                position=position,
                kind=StepKind.MODEL,
                tool_calls=[command_call(command)],
                prompt_token_ids=[1, 2, 3],
                output_token_ids=[4, 5],
            ),
            Step(trajectory_id=trajectory.id, position=position + 1, kind=StepKind.TOOL, content=f"you {command}"),
        ):
            await memory.trajectories.append(step, trajectory=trajectory)
        position += 2
    closed = await memory.trajectories.close(trajectory.id, stage=stage, answer="done")
    if reward is not None:
        await memory.trajectories.reward(trajectory.id, reward, RewardSource.ENVIRONMENT)
    return closed


def operation(kind: OperationKind, text: str, new_text: str | None = None, counts: SupportCounts | None = None):
    return InsightOperation(kind, "kitchen", "cooking", text, new_text, counts)


def add(text: str, counts: SupportCounts | None = None) -> InsightOperation:
    return operation(OperationKind.ADD, text, counts=counts)
