"""Cells of an evaluation: held-out tasks as one policy plays them, with or without memory.

Flow: `play_cell` per cell -> `pair_tasks` of two cells -> `compare_pairs`, task by task.
Hazard: the tries of one task resemble each other, so intervals and tests are over tasks, not over episodes.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from memory.errors import SpentBudget, find_spent_budget
from memory.records.trajectories import ModelCalls
from memory.schema import Task, Trajectory, TrajectoryStage
from memory.statistics import wilson_interval
from memory.storage.whole_files import write_whole
from optimizer.evaluation.intervals import PairedDifference, compare_anytime, compare_paired, mean_interval
from optimizer.seams import OnProgress, Rollout, play_all

STORED_CALLS = "num_turns"
"""The key of `HeldOutEpisode.num_calls` in files."""

GradeTrajectory = Callable[[str], float | None]
"""Trajectory id -> the reward that counts."""
CountModelCalls = Callable[[str], ModelCalls]
"""Trajectory id -> its model calls, counted from its steps."""

SEED_STRIDE = 1000  # between tries: every model call of an episode takes the next seed


@dataclass(frozen=True)
class Cell:
    """One way of playing: a policy, with or without memory. `name` ends in `-on` or `-off`."""

    name: str
    policy: int
    use_memory: bool


@dataclass(frozen=True)
class HeldOutEpisode:
    """The outcome of one held-out episode."""

    task: str
    trajectory_id: str
    is_success: bool
    is_broken: bool
    """It did not end by itself (FAILED, cancelled, out of time), or has no reward. It counts as lost."""
    is_truncated: bool
    """A budget of steps or tokens ended it."""
    num_calls: int
    """Model calls; in files `STORED_CALLS`."""
    prompt_tokens: int
    output_tokens: int
    num_invalid_tool_calls: int
    num_calling_tools: int | None = None
    """Model calls whose reply called a tool; None in files of an older release."""


@dataclass(frozen=True)
class CellResult:
    """All tasks as one cell played them, each once or several times."""

    cell: Cell
    played: list[HeldOutEpisode]
    num_unpaired: int = 0
    """Tasks that clients tried and that are left out, because both policies have not tried them alike."""

    @cached_property
    def by_task(self) -> dict[str, list[HeldOutEpisode]]:
        # in the order of the tasks, which pairs and reports keep
        tries: dict[str, list[HeldOutEpisode]] = defaultdict(list)
        for episode in self.played:
            tries[episode.task].append(episode)
        return dict(tries)

    @property
    def num_successes(self) -> int:
        return sum(episode.is_success for episode in self.played)

    @property
    def success(self) -> float:
        """Pass@1: the share of tries that succeeded."""
        return self.num_successes / len(self.played) if self.played else 0.0

    @property
    def num_tries(self) -> int:
        """Tries of each task, the fewest of any."""
        # the fewest, so that pass@k never claims more tries than each task had
        return min(map(len, self.by_task.values()), default=0)

    def share(self, flag: str) -> float:
        return sum(getattr(episode, flag) for episode in self.played) / max(1, len(self.played))

    def per_call(self, count: str) -> float:
        return sum(getattr(episode, count) for episode in self.played) / max(1, self.num_calls)

    @property
    def num_calls(self) -> int:
        return sum(episode.num_calls for episode in self.played)

    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval of pass@1; tries of one task resemble each other, so it is over tasks."""
        if self.num_tries <= 1:
            return wilson_interval(self.num_successes, len(self.played))
        # over tasks: Wilson's interval over tries would be too narrow
        _, low, high = mean_interval([share_won(tries) for tries in self.by_task.values()])
        return max(0.0, low), min(1.0, high)

    def summary(self) -> CellSummary:
        """Return the figures of this cell for a report."""
        low, high = self.interval()
        num_tries, tasks = self.num_tries, self.by_task.values()
        solved = sum(any(episode.is_success for episode in tries) for tries in tasks)
        num_episodes = max(1, len(self.played))
        return CellSummary(
            policy=self.cell.policy,
            use_memory=self.cell.use_memory,
            num_tasks=len(tasks),
            num_tries=num_tries,
            num_episodes=len(self.played),
            num_successes=self.num_successes,
            success=self.success,
            low=low,
            high=high,
            pass_at_tries=solved / len(tasks) if num_tries > 1 else None,
            turns_per_episode=self.num_calls / num_episodes,
            prompt_tokens_per_turn=self.per_call("prompt_tokens"),
            output_tokens_per_turn=self.per_call("output_tokens"),
            tokens_per_episode=sum(e.prompt_tokens + e.output_tokens for e in self.played) / num_episodes,
            invalid_per_turn=self.per_call("num_invalid_tool_calls"),
            broken_share=self.share("is_broken"),
            truncated_share=self.share("is_truncated"),
        )


@dataclass(frozen=True)
class CellSummary:
    """The figures of one cell in a report. The field names are a stored format; a `turn` in them is a model call."""

    policy: int
    use_memory: bool
    num_tasks: int
    num_tries: int
    """Of each task, the fewest of any."""
    num_episodes: int
    num_successes: int
    success: float
    """Pass@1; `low` and `high` are its 95 % interval."""
    low: float
    high: float
    pass_at_tries: float | None
    """The share of tasks that any of `num_tries` solved; None where each was tried once."""
    turns_per_episode: float
    prompt_tokens_per_turn: float
    output_tokens_per_turn: float
    tokens_per_episode: float
    invalid_per_turn: float
    """Invalid tool calls."""
    broken_share: float
    truncated_share: float


def share_won(tries: Sequence[HeldOutEpisode]) -> float:
    """Return the share of tries that succeeded."""
    return sum(episode.is_success for episode in tries) / len(tries)


async def play_cell(
    cell: Cell,
    tasks: Sequence[Task],
    *,
    rollout: Rollout,
    grade: GradeTrajectory,
    count_model_calls: CountModelCalls,
    success_reward: float,
    concurrency: int,
    temperature: float = 0.0,
    num_tries: int = 1,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> CellResult:
    """Play every task `num_tries` times, at most `concurrency` episodes at a time."""

    async def play(task: Task, number: int) -> HeldOutEpisode:
        trajectory = await rollout(
            task,
            policy=cell.policy,
            use_memory=cell.use_memory,
            temperature=temperature,
            # the same seeds for every cell: a difference is the policy's
            seed=seed + SEED_STRIDE * number,
        )
        calls = count_model_calls(trajectory.id)
        return describe(task.name, trajectory, grade(trajectory.id), success_reward, calls)

    episodes = [partial(play, task, number) for task in tasks for number in range(num_tries)]
    played = await play_all(episodes, concurrency=concurrency, label=cell.name, on_progress=on_progress)
    return CellResult(cell, played)


def describe(
    task: str, trajectory: Trajectory, reward: float | None, success_reward: float, calls: ModelCalls
) -> HeldOutEpisode:
    """Sum up one episode."""
    is_finished = trajectory.stage is TrajectoryStage.FINISHED
    # an episode that its client abandoned was cut by no budget: its reward counts
    spent = find_spent_budget(trajectory.error) if is_finished else None
    # a clock says more about the machine than about the policy; steps and tokens are the policy's own
    is_out_of_time = spent is SpentBudget.TIME
    is_broken = not is_finished or is_out_of_time or reward is None
    is_success = not is_broken and reward is not None and reward >= success_reward
    return HeldOutEpisode(
        task=task,
        trajectory_id=trajectory.id,
        is_success=is_success,
        is_broken=is_broken,
        is_truncated=spent is not None and not is_out_of_time,
        num_calls=calls.num,
        prompt_tokens=trajectory.prompt_tokens,
        output_tokens=trajectory.output_tokens,
        num_invalid_tool_calls=trajectory.num_invalid_tool_calls,
        num_calling_tools=calls.num_calling_tools,
    )


@dataclass(frozen=True)
class Pair:
    """One task as both cells played it."""

    task: str
    ours: list[HeldOutEpisode]
    theirs: list[HeldOutEpisode]

    @property
    def gain(self) -> float:
        """How much more of its tries the first won."""
        return share_won(self.ours) - share_won(self.theirs)


def pair_tasks(candidate: CellResult, incumbent: CellResult) -> list[Pair]:
    """Return the tasks that both played. A broken try counts as lost; a task whose tries all broke on both sides is
    left out, because it says nothing."""
    pairs = [
        Pair(task, ours, incumbent.by_task[task])
        for task, ours in candidate.by_task.items()
        if task in incumbent.by_task
    ]
    # only where *all* broke: to leave out tasks that broke on one side would favour a policy that breaks off when it
    # loses
    return [pair for pair in pairs if not all(episode.is_broken for episode in (*pair.ours, *pair.theirs))]


def compare_pairs(pairs: Iterable[Pair], confidence: float = 0.95, *, is_open_ended: bool = False) -> PairedDifference:
    """Compare how much both won of the same tasks. `is_open_ended`: their number was not fixed before they were
    played."""
    pairs = list(pairs)
    ours, theirs = [share_won(pair.ours) for pair in pairs], [share_won(pair.theirs) for pair in pairs]
    compare = compare_anytime if is_open_ended else compare_paired
    return compare(ours, theirs, confidence)


def write_cell(path: Path, result: CellResult) -> None:
    """Write the episodes of a cell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # whole: release_gate.py takes an existing file for a played cell
    write_whole(path, json.dumps([_to_json(episode) for episode in result.played]))


def read_cell(path: Path, cell: Cell) -> CellResult:
    """Read what `write_cell` wrote."""
    return CellResult(cell, [_from_json(episode) for episode in json.loads(path.read_text(encoding="utf-8"))])


def _to_json(episode: HeldOutEpisode) -> dict[str, object]:
    stored = dict(vars(episode))
    # files of open cycles have the old name
    stored[STORED_CALLS] = stored.pop("num_calls")
    return stored


def _from_json(stored: dict[str, Any]) -> HeldOutEpisode:
    # strict: a field that is added here makes the files of open cycles unreadable
    return HeldOutEpisode(num_calls=stored.pop(STORED_CALLS), **stored)
