"""Plays many tasks through a running server and summarizes the episodes; and plays the games of a pretraining.

Steps: list the tasks, have the server prepare them, play each with one chat completion, a bounded number concurrently.
Invariant: a failed episode counts as not successful, and is also counted separately.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memory.statistics import wilson_interval
from runtime.cli.client import Client, ErrorReply

if TYPE_CHECKING:
    from rich.console import Console

PREPARED_TOGETHER = 16
"""Tasks in one request for preparation: few enough to show progress, enough to keep all compilers busy."""
# `EpisodeFailed.status` of runtime/api/errors.py, which imports FastAPI and would slow down the command.
FAILED_EPISODE_STATUS = 502

OnPlayed = Callable[[int, int, int], None]
"""`on_played(num_done, num_successes, num_tasks)`."""


@dataclass(frozen=True)
class PlayRequest:
    """The tasks to play, the policy that plays them, and the sampling."""

    environment: str = "textworld"
    num_tasks: int = 64
    split: str = "held-out"
    seeds: str | None = None
    """`900000:900200` instead of the split's first tasks; the end is exclusive."""
    policy: str | None = None
    use_memory: bool = True
    temperature: float = 0.0
    seed: int = 0
    concurrency: int = 16

    @property
    def model(self) -> str:
        if self.policy is None or self.policy == "active":
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


async def play_tasks(
    client: Client, request: PlayRequest, *, on_phase: Callable[[str], None], on_played: OnPlayed
) -> dict[str, Any]:
    """Play the tasks and return the summary.

    Raises:
        ErrorReply, ServerUnreachable; ValueError for invalid seeds and for a split without tasks.
    """
    names = await list_tasks(client, request)
    on_phase(f"preparing {len(names)} tasks")
    for start in range(0, len(names), PREPARED_TOGETHER):
        batch = {"tasks": names[start : start + PREPARED_TOGETHER]}
        await client.post(f"/v1/environments/{request.environment}/prepare", batch, is_repeatable=True)
        on_phase(f"preparing tasks: {min(start + PREPARED_TOGETHER, len(names))} of {len(names)}")
    started = time.monotonic()
    episodes = await _play_all(client, request, names, on_played)
    return summarize(request, episodes, seconds=time.monotonic() - started)


async def list_tasks(client: Client, request: PlayRequest) -> list[str]:
    """Return the names of the tasks to play."""
    if request.seeds is not None:
        return parse_seeds(request.seeds)
    path = f"/v1/environments/{request.environment}/tasks"
    listed = await client.get(path, split=request.split, num_tasks=request.num_tasks)
    if not listed["data"]:
        raise ValueError(f"{request.environment} has no task of the split {request.split!r}")
    return [task["name"] for task in listed["data"]]


async def _play_all(
    client: Client, request: PlayRequest, names: Sequence[str], on_played: OnPlayed
) -> list[dict[str, Any]]:
    semaphore = asyncio.Semaphore(request.concurrency)
    finished: list[dict[str, Any]] = []

    async def play_one(name: str) -> dict[str, Any]:
        async with semaphore:
            episode = await _play_one(client, request, name)
        finished.append(episode)
        on_played(len(finished), sum(bool(it["success"]) for it in finished), len(names))
        return episode

    tasks = [asyncio.ensure_future(play_one(name)) for name in names]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:  # after the first error, or Ctrl-C, `gather` leaves the others running
            task.cancel()


async def _play_one(client: Client, request: PlayRequest, name: str) -> dict[str, Any]:
    body = {
        "model": request.model,
        "messages": [],
        "temperature": request.temperature,
        "seed": request.seed,
        "metadata": {
            "environment": request.environment,
            "task": name,
            "use_memory": "on" if request.use_memory else "off",
        },
    }
    try:
        # Repeatable: the server closes an episode whose client broke off, and a retry opens another one.
        answer = await client.post("/v1/chat/completions", body, is_repeatable=True)
    except ErrorReply as error:
        if error.body.get("status") != FAILED_EPISODE_STATUS:
            raise
        failed = {"trajectory_id": error.body.get("trajectory_id"), "error": str(error), "stage": "failed"}
        return {"task": name, "success": False, "reward": None, **failed}
    return {"task": name, **answer["ratchet"]}


def summarize(request: PlayRequest, episodes: Sequence[dict[str, Any]], *, seconds: float) -> dict[str, Any]:
    """Return the totals over all episodes, and the episodes."""

    def total(name: str) -> int:
        return sum(episode.get(name, 0) for episode in episodes)

    num_successes = sum(bool(episode["success"]) for episode in episodes)
    low, high = wilson_interval(num_successes, len(episodes))
    policies = sorted({episode["policy"] for episode in episodes if "policy" in episode})
    return {
        "environment": request.environment,
        "split": None if request.seeds else request.split,
        "seeds": request.seeds,
        "policy": policies[0] if len(policies) == 1 else policies,
        "use_memory": request.use_memory,
        "temperature": request.temperature,
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


async def play_transcripts(directory: Path, *, num_games: int, console: Console) -> None:
    """Write `transcripts.json` in `directory`, unless it is there: an interrupted run plays again, with the games that
    are compiled already, because the file is written as a whole at the end."""
    from rich.progress import track

    from runtime.environments.textworld import TextWorld
    from runtime.environments.textworld_expert import write_transcripts

    transcripts = directory / "transcripts.json"
    if transcripts.exists():
        return
    bar = iter(track(range(num_games), "compiling games", console=console))

    def advance(num_done: int, num_games: int) -> None:
        next(bar, None)

    await write_transcripts(TextWorld(directory / "games"), transcripts, num_games=num_games, on_progress=advance)
