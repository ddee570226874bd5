"""Plays many tasks through a running server and adds up what became of them.

Refuses to know how an episode is played: each is one chat completion.
Flow: name the tasks -> have them prepared -> play, a bounded number at a time -> sum up.
Invariant: an episode that failed counts as not successful, and is counted by itself too.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from memory.statistics import wilson_interval
from runtime.cli.client import Client, Refused

PREPARE_AT_ONCE = 16
"""Tasks in one request to prepare: progress is seen, and a pool of compilers has enough to do."""
FAILED_EPISODE = 502

OnPlayed = Callable[[int, int, int], None]
"""`on_played(num_done, num_successes, num_tasks)`."""


@dataclass(frozen=True)
class Order:
    """What to play and how."""

    environment: str = "textworld"
    num_tasks: int = 64
    split: str = "held-out"
    seeds: str | None = None
    """`900000:900200`: these instead of the split's first; the end is left out, as in Python."""
    policy: str | None = None
    use_memory: bool = True
    temperature: float = 0.0
    seed: int = 0
    concurrency: int = 16

    @property
    def model(self) -> str:
        if self.policy in (None, "active"):
            return "agent"
        return f"agent@v{self.policy.removeprefix('v')}"


def parse_seeds(text: str) -> list[str]:
    """Return the task names of `900000:900200`, or of a single seed.

    Raises:
        ValueError: anything else.
    """
    first, colon, end = text.partition(":")
    if not first.isdecimal() or (colon and not end.isdecimal()):
        raise ValueError(f"seeds are given as 900000:900200, not as {text!r}")
    names = [str(seed) for seed in range(int(first), int(end) if colon else int(first) + 1)]
    if not names:
        raise ValueError(f"seeds {text!r} name no task: the end must be above the start")
    return names


async def play(client: Client, order: Order, *, on_phase: Callable[[str], None], on_played: OnPlayed) -> dict[str, Any]:
    """Play what was ordered and return the summary.

    Raises:
        Refused, NoServer, ValueError.
    """
    names = await name_tasks(client, order)
    on_phase(f"preparing {len(names)} tasks")
    for start in range(0, len(names), PREPARE_AT_ONCE):
        batch = {"tasks": names[start : start + PREPARE_AT_ONCE]}
        await client.post(f"/v1/environments/{order.environment}/prepare", batch, is_repeatable=True)
        on_phase(f"preparing tasks: {min(start + PREPARE_AT_ONCE, len(names))} of {len(names)}")
    started = time.monotonic()
    episodes = await _play_all(client, order, names, on_played)
    return summarize(order, episodes, seconds=time.monotonic() - started)


async def name_tasks(client: Client, order: Order) -> list[str]:
    """Return the names of the tasks to play."""
    if order.seeds is not None:
        return parse_seeds(order.seeds)
    path = f"/v1/environments/{order.environment}/tasks"
    listed = await client.get(path, split=order.split, num_tasks=order.num_tasks)
    return [task["name"] for task in listed["data"]]


async def _play_all(client: Client, order: Order, names: Sequence[str], on_played: OnPlayed) -> list[dict[str, Any]]:
    gate = asyncio.Semaphore(order.concurrency)
    finished: list[dict[str, Any]] = []

    async def play_one(name: str) -> dict[str, Any]:
        async with gate:
            episode = await _play_one(client, order, name)
        finished.append(episode)
        on_played(len(finished), sum(bool(one["success"]) for one in finished), len(names))
        return episode

    under_way = [asyncio.ensure_future(play_one(name)) for name in names]
    try:
        return await asyncio.gather(*under_way)
    finally:
        for one in under_way:  # the first refusal, or Ctrl-C, ends them all
            one.cancel()


async def _play_one(client: Client, order: Order, name: str) -> dict[str, Any]:
    request = {
        "model": order.model,
        "messages": [],
        "temperature": order.temperature,
        "seed": order.seed,
        "metadata": {
            "environment": order.environment,
            "task": name,
            "use_memory": "on" if order.use_memory else "off",
        },
    }
    try:
        # A broken-off episode is closed by the server; another try is another episode.
        answer = await client.post("/v1/chat/completions", request, is_repeatable=True)
    except Refused as refused:
        if refused.body.get("status") != FAILED_EPISODE:
            raise
        failed = {"trajectory_id": refused.body.get("trajectory_id"), "error": str(refused), "stage": "failed"}
        return {"task": name, "success": False, "reward": None, **failed}
    return {"task": name, **answer["ratchet"]}


def summarize(order: Order, episodes: Sequence[dict[str, Any]], *, seconds: float) -> dict[str, Any]:
    """Return what all episodes came to, and each of them."""

    def total(name: str) -> int:
        return sum(episode.get(name, 0) for episode in episodes)

    num_successes = sum(bool(episode["success"]) for episode in episodes)
    low, high = wilson_interval(num_successes, len(episodes))
    policies = sorted({episode["policy"] for episode in episodes if "policy" in episode})
    return {
        "environment": order.environment,
        "split": None if order.seeds else order.split,
        "seeds": order.seeds,
        "policy": policies[0] if len(policies) == 1 else policies,
        "use_memory": order.use_memory,
        "temperature": order.temperature,
        "success": num_successes / len(episodes) if episodes else 0.0,
        "low": low,
        "high": high,
        "num_tasks": len(episodes),
        "num_successes": num_successes,
        "num_failed": sum(episode["stage"] != "finished" for episode in episodes),
        "num_steps": total("num_steps"),
        "num_turns": total("num_turns"),
        "prompt_tokens": total("prompt_tokens"),
        "output_tokens": total("output_tokens"),
        "num_invalid_tool_calls": total("num_invalid_tool_calls"),
        "seconds": round(seconds, 3),
        "episodes": list(episodes),
    }
