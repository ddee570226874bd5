"""Measures everything a cycle needs before it opens: rows of each method, held-out tasks, memory on a GPU.

`optimizer.data.needs` has the counts of rows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace

from memory.schema import Split
from memory.store import Memory
from optimizer.config import OptimizerConfig
from optimizer.cycle.branching import require_replay
from optimizer.cycle.methods import Choice, choose_methods, list_methods
from optimizer.cycle.stages import Method
from optimizer.data.needs import CAPACITY, REPLAY, LoggedData, Need
from optimizer.errors import CannotReplay
from optimizer.placement import Placement, find_placement
from optimizer.seams import Seams


async def measure_needs(memory: Memory, config: OptimizerConfig, seams: Seams | None = None) -> list[Need]:
    """Return what a cycle with these settings needs; with `seams`, also its held-out tasks and the memory to train.

    Raises: whatever `seams.tasks` raises for an environment that does not exist.
    """
    if seams is not None:
        config = fit_to_environment(config, seams)
    logged = await asyncio.to_thread(LoggedData.read, memory, config)
    choice = choose_methods(logged)
    needs = measure_rows(logged, choice)
    return needs if seams is None else needs + await measure_surroundings(memory, config, seams, choice)


def measure_rows(logged: LoggedData, choice: Choice) -> list[Need]:
    """Return the needs for rows of the chosen methods; that of the first is required."""
    needs = [method.measure_need(logged, logged.config.practice_rounds) for method in list_methods(choice.methods)]
    return [replace(need, is_required=number == 0) for number, need in enumerate(needs)]


async def measure_surroundings(memory: Memory, config: OptimizerConfig, seams: Seams, choice: Choice) -> list[Need]:
    """Return what a cycle needs besides rows: held-out tasks, and memory to train, for which packages are loaded.

    Raises: whatever `seams.tasks` raises for an environment that does not exist.
    """
    methods = list_methods(choice.methods)
    in_rounds = {method.name: rounds.rounds for method in methods if (rounds := config.find_rounds(method.name))}
    plays = config.practice_episodes or config.explore_episodes or in_rounds
    practice = [_need_practice_tasks(config, seams, in_rounds)] if plays else []
    replays = [_need_replay(config, seams, method) for method in methods if method.play_on]
    capacity = await _need_capacity(memory, config, seams, choice)
    return [*replays, *practice, _need_held_out_tasks(config, seams), capacity]


def fit_to_environment(config: OptimizerConfig, seams: Seams) -> OptimizerConfig:
    """Return the settings with no more practice tasks than the environment has: the rounds become shorter and more, and
    the number of episodes stays."""
    if not config.environment:
        return config
    available = len(seams.tasks(config.environment, Split.PRACTICE, config.num_practice_tasks))
    # with none at all the settings stay, and the need for practice tasks says so
    return config.model_copy(update={"num_practice_tasks": available or config.num_practice_tasks})


def _need_practice_tasks(config: OptimizerConfig, seams: Seams, in_rounds: Mapping[str, int]) -> Need:
    """Return the need for tasks to play; the methods `in_rounds`, name to number, play them in any case."""
    num_wanted = config.num_practice_tasks + config.num_selection_tasks
    listed = len(seams.tasks(config.environment, Split.PRACTICE, num_wanted))
    available = min(listed, config.num_practice_tasks)
    num_rounds = len(config.practice_rounds) + len(config.explore_rounds) + sum(in_rounds.values())
    detail = f"{available} tasks of {config.environment!r} are played in {num_rounds} rounds"
    if listed < num_wanted:
        detail += f", and {listed - available} are left to choose a checkpoint by"
    mend = "give the environment tasks of the split practice, or set practice_episodes and explore_episodes to 0"
    if in_rounds:
        mend += f" and leave out {' and '.join(in_rounds)}, which plays them too"
    return Need(
        name="practice tasks",
        needed=1,
        available=available,
        is_required=True,
        detail=detail if available else f"{config.environment!r} has no practice task",
        mend=mend,
    )


def _need_replay(config: OptimizerConfig, seams: Seams, method: Method) -> Need:
    try:
        require_replay(seams, config.environment, method)
    except CannotReplay as error:
        return Need(REPLAY, 1, 0, is_required=True, detail=str(error), mend="until then nothing is played")
    return Need(REPLAY, 1, 1, is_required=True, detail=f"episodes of {config.environment!r} can be replayed")


def _need_held_out_tasks(config: OptimizerConfig, seams: Seams) -> Need:
    wanted = config.evaluation
    if not config.environment:
        return Need(
            name="held-out tasks",
            needed=wanted.min_tasks,
            available=0,
            playable=wanted.min_tasks,
            detail="clients play them as the candidate and as the active policy; `judge` decides then",
        )
    num_tasks = wanted.count_tasks(seams.serving(config.environment).temperature)
    # counted from 0 and not from this cycle's offset: blocks wrap around (context.take_held_out)
    available = len(seams.tasks(config.environment, Split.HELD_OUT, num_tasks))
    return Need(
        name="held-out tasks",
        needed=wanted.min_tasks,
        available=available,
        detail=f"the gate plays {available} tasks of {config.environment!r}",
        mend="with fewer no verdict is possible and the candidate waits: raise evaluation.num_tasks, or give the "
        "environment more held-out tasks",
    )


async def _need_capacity(memory: Memory, config: OptimizerConfig, seams: Seams, choice: Choice) -> Need:
    try:
        placement = await find_placement(memory, config, seams.inspect_hardware)
    # TrainingDoesNotFit is a ValueError too; other errors of `seams` must reach the caller
    except ValueError as error:  # no GPU has the memory, or the base's files are not on this machine
        return Need(CAPACITY, 1, 0, is_required=True, detail=str(error), mend="until then nothing is learned")
    return Need(CAPACITY, 1, 1, is_required=True, detail=f"{placement}, {_describe_lengths(placement, choice)}")


def _describe_lengths(placement: Placement, choice: Choice) -> str:
    first, *others = list_methods(choice.methods)
    lengths = [f"rows of up to {placement.max_length_tokens(first.loss)} tokens ({first.title})"]
    lengths += [f"{placement.max_length_tokens(other.loss)} ({other.title})" for other in others]
    return " and ".join(lengths)
