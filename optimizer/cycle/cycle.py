"""One learning cycle: collect, the stages of each method of learning, evaluate, settle.

The position of a cycle is the stage on its row, written before the stage begins. A process that dies resumes at that
stage, and repeats it: each stage reads back the artifacts it has saved.

Invariant: a cycle ends COMPLETED with a verdict, or ERROR with a reason; one that is cancelled or killed stays open
until `run_cycle` resumes it or `abandon_cycle` closes it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from memory.schema import Cycle, CycleStage
from memory.store import Memory
from optimizer.config import OptimizerConfig
from optimizer.cycle import release_gate
from optimizer.cycle.artifacts import DecidedVerdict, to_json
from optimizer.cycle.branching import require_replay
from optimizer.cycle.context import CycleContext
from optimizer.cycle.methods import choose_methods, list_methods, train_control
from optimizer.cycle.readiness import fit_to_environment, measure_rows, measure_surroundings
from optimizer.cycle.stages import Stage, collect
from optimizer.data.needs import LoggedData, require_needs
from optimizer.errors import OptimizerError
from optimizer.seams import Seams


async def open_cycle(memory: Memory, config: OptimizerConfig, *, seams: Seams | None = None) -> Cycle:
    """Open a cycle with these settings and record its pool of episodes, its methods of learning and its needs. With
    `seams`, the functions that reach the runtime, the held-out tasks and the GPU memory for its trainings are checked
    as well.

    Raises:
        CycleInProgress: another cycle is open.
        CannotReplay: a method replays episodes, and the environment cannot be replayed.
        TrainingDoesNotFit: no GPU has the memory for it.
        TooFewTrajectories: logged episodes and practice together are not enough to train on.
    """
    if seams is not None:
        config = fit_to_environment(config, seams)
    # before the GPUs are looked at, which loads packages: too few rows is the frequent error
    logged = await asyncio.to_thread(LoggedData.read, memory, config)
    choice = choose_methods(logged)
    needs = measure_rows(logged, choice)
    require_needs(needs)
    if seams is not None:
        needs += await measure_surroundings(memory, config, seams, choice)
        require_needs(needs)
    # two writes: a crash in between leaves an open cycle without a note, which reports show as empty
    pool = describe_pool(await asyncio.to_thread(memory.trajectories.count_learnable), config)
    cycle = await memory.cycles.open(config.model_dump(mode="json"))
    root = await asyncio.to_thread(memory.policies.root)
    chosen = {"methods": list(choice.methods), "methods_reason": choice.reason, "root": root}
    return await memory.cycles.save(
        cycle.id, artifacts={"pool": pool, **chosen, "needs": [need.to_json() for need in needs]}
    )


async def run_cycle(memory: Memory, cycle_id: str, *, seams: Seams) -> DecidedVerdict:
    """Run the stages of an open cycle, from the one that its row says it has reached; return the gate's verdict.

    Raises:
        OptimizerError: a stage could not do its work. Whatever a stage raises closes the cycle, and its row keeps the
            reason; a cancellation alone leaves it open.
    """
    context = CycleContext(memory, seams, cycle_id)
    try:
        # A method that branches off recorded episodes needs an environment that can repeat them: asked here, before
        # any stage plays for an hour.
        for method in list_methods(context.artifacts.methods):
            if method.play_on is not None:
                require_replay(seams, context.config.environment, method)
        for stage in list_remaining_stages(context.config, context.artifacts.methods, context.stage):
            # Durable before the stage begins: after a crash a stage is repeated, never skipped.
            await context.enter(stage.name)
            began = time.monotonic()
            await stage.run(context)
            await context.add_seconds(stage.name, time.monotonic() - began)
    # not BaseException: a cancellation must leave the row open, or a restart of the server would end the cycle
    except Exception as error:
        await memory.cycles.save(cycle_id, stage=CycleStage.ERROR, error=_explain(error))
        raise
    verdict = context.artifacts.verdict
    assert verdict is not None, "the last stage saves the verdict"
    # `settle`, the last stage, has promoted or rejected the candidate. A crash before this line repeats that stage,
    # which finds this done and changes nothing.
    await memory.cycles.save(cycle_id, stage=CycleStage.COMPLETED, verdict=to_json(verdict))
    return verdict


def list_remaining_stages(config: OptimizerConfig, methods: Sequence[str], position: str) -> list[Stage]:
    """Return the stages of a cycle with these methods, from `position` on, that the configuration needs. A stage that
    two methods share runs once, for the first of them.

    Raises:
        OptimizerError: there is no such method, or none with a stage of that name: another version opened the cycle.
    """
    chosen = list_methods(methods)
    every_stage = (
        Stage("collect", lambda context: collect(context, chosen[0])),
        *(stage.bind(method) for method in chosen for stage in method.stages),
        Stage("control", train_control, is_needed=lambda config: config.trains_control),
        Stage("evaluate", release_gate.evaluate),
        Stage("settle", release_gate.decide),
    )
    stages: dict[str, Stage] = {}
    for stage in every_stage:
        stages.setdefault(stage.name, stage)
    names = list(stages)
    if position not in names:
        raise OptimizerError(f"no method of learning has a stage {position!r}: cancel this cycle and start another")
    return [stages[name] for name in names[names.index(position) :] if stages[name].is_needed(config)]


async def abandon_cycle(memory: Memory, cycle_id: str, reason: str) -> Cycle:
    """Close a cycle whose `run_cycle` was cancelled and that shall not be resumed."""
    return await memory.cycles.save(cycle_id, stage=CycleStage.ERROR, error=reason)


def describe_pool(counts: dict[str, int], config: OptimizerConfig) -> str:
    """Return a sentence about whose episodes a cycle learns from and which it leaves out.

    `counts`: rewarded episodes by environment; `""` stands for live traffic.
    """
    ours = config.pool_environments
    note = f"weights learn from {' and '.join(_name_pool(environment) for environment in ours)} only"
    others = [
        f"{number} of {_name_pool(environment)}" for environment, number in counts.items() if environment not in ours
    ]
    if others:
        note += f"; rewarded episodes left out: {', '.join(sorted(others))}"
    if counts.get("") and "" not in ours:
        note += ". Live traffic, corrections included, is learned from by `learn --logged` and proved on live tasks"
    return note


def _name_pool(environment: str) -> str:
    return f"{environment!r}" if environment else "live traffic"


def _explain(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):  # of episodes played at once, the first that failed says enough
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"
