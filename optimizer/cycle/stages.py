"""The stages of a cycle before the release gate, and the description of a method of learning.

`collect` plays and extracts insights; `build_rows` and `train` serve every method: they know no method by name. Each
stage can be repeated after a crash: the artifacts it has saved are read back instead of being made again.

Invariant: an adapter's policy version is reserved before training begins, because the adapter is named after it.
"""

from __future__ import annotations

import asyncio
import math
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memory.adapters import digest_adapter, read_manifest
from memory.schema import Policy, PolicyStage
from optimizer.config import OptimizerConfig
from optimizer.cycle import practice
from optimizer.cycle.artifacts import VERSION_SUFFIX, CycleArtifacts, RowsSummary, TrainedAdapter
from optimizer.cycle.context import CycleContext
from optimizer.cycle.selection import choose_policy
from optimizer.data.needs import MeasureNeed
from optimizer.data.rows import (
    BuiltRows,
    Material,
    count_tokens,
    describe_mismatch,
    has_own_tokens,
    leave_out_all,
    read_rows,
    write_rows,
)
from optimizer.data.shares import count_rows
from optimizer.errors import OptimizerError, TemplateMismatch, TooFewTrajectories
from optimizer.placement import Placement, find_placement
from optimizer.rewards import GradedTrajectory
from optimizer.training.base import load_tokenizer
from optimizer.training.footprint import LIKELIHOOD, LossShape
from optimizer.training.launch import read_finished
from optimizer.training.spec import EarlyAdapter, TrainingSpec

MEASURES = (
    ("accuracy", "rewards/accuracies"),
    ("accuracy", "mean_token_accuracy"),
    ("margin", "rewards/margins"),
)
"""A trainer's measures, as progress shows the first that it reports."""


@dataclass(frozen=True)
class Stage:
    """One step of a cycle. Its name is shown by the HTTP API and is the position at which a cycle resumes."""

    name: str
    run: Callable[[CycleContext], Awaitable[object]]
    """Reads `context.artifacts`, saves the artifacts it makes, and returns the last of them."""
    is_needed: Callable[[OptimizerConfig], bool] = lambda config: True


@dataclass(frozen=True)
class MethodStage:
    """A stage that serves any method which lists it."""

    name: str
    run: Callable[[CycleContext, Method], Awaitable[object]]
    is_needed: Callable[[OptimizerConfig], bool] = lambda config: True

    def bind(self, method: Method) -> Stage:
        return Stage(self.name, lambda context: self.run(context, method), self.is_needed)


PlayOn = Callable[[CycleContext, "Method", int, str], Awaitable[None]]
"""`await play_on(context, method, policy, label)`; repeated after a crash, it plays what is missing."""


@dataclass(frozen=True)
class Method:
    """One way to turn episodes into an adapter: its rows, its trainer and its stages."""

    name: str
    title: str
    """As reports write it."""
    rows: str
    """The name of its rows: of their artifact and their file, and of the section of the configuration that bounds
    them."""
    build: Callable[[Material], BuiltRows[Any]]
    min_rows: Callable[[OptimizerConfig], int]
    measure_need: MeasureNeed
    describe: Callable[[dict[str, Any]], list[str]]
    """Summary of its rows, as stored -> paragraphs of the report."""
    note: str
    """Kept with each policy that it trains."""
    stages: tuple[MethodStage, ...]
    trainer: str = ""
    """The module of `optimizer.training` that is its child process, and its entry in a recipe; empty: its name."""
    continues: bool = True
    """Whether it continues the adapter of the methods before it in the cycle, and the cycle's root where there is none;
    its candidate is chosen among that adapter and those after each of its epochs. False: it always starts from the
    root, and comes first."""
    plays_with_memory: bool = False
    """Whether its rounds, if it trains in rounds, are played with memory too."""
    play_on: PlayOn | None = None
    """Plays branches of a round's own episodes once these are played. It replays the environment."""
    loss: LossShape = LIKELIHOOD
    choose_loss: Callable[[OptimizerConfig], dict[str, Any]] = lambda config: {}
    """The fields of a training's spec that say which form of the loss is configured."""

    @property
    def kind(self) -> str:
        """Return what its specs and the recipes call its training."""
        return self.trainer or self.name

    reads_new_episodes_only: Callable[[OptimizerConfig], bool] = lambda config: False
    """Whether only episodes of this cycle become rows."""


async def collect(context: CycleContext, first: Method) -> None:
    """Play practice tasks that no earlier cycle has played, and extract insights.

    Raises:
        TooFewTrajectories: the remaining rounds cannot bring enough rows for the first method of the cycle.
    """
    for environment in context.config.learn_from:
        context.take_held_out(environment, 0)  # an unknown name fails here, not after an hour of training
    # chosen once: a repeated stage must play the same tasks
    if context.artifacts.practice_offset is None:
        offset = find_practice_offset(context)
        await context.save_artifacts(practice_offset=offset, practice_end=offset + context.config.num_practice_tasks)
    await practice.practice(context, first.measure_need)


def find_practice_offset(context: CycleContext) -> int:
    """Return where the practice of this cycle begins: behind the tasks of earlier cycles in the same environment."""
    # select() returns the newest 50 cycles; offsets only grow, so older ones matter only where 50 cycles of other
    # environments lie between, and then tasks are practised again
    earlier = [
        cycle
        for cycle in context.memory.cycles.select()
        if cycle.id != context.cycle_id and cycle.settings.get("environment") == context.config.environment
    ]
    return max((CycleArtifacts.read(cycle.artifacts).practice_end or 0 for cycle in earlier), default=0)


async def build_rows(context: CycleContext, method: Method) -> RowsSummary:
    """Build the rows of a method from the episodes that weights may learn from, and write them to its file; where its
    training has begun, return their summary.

    Raises:
        TemplateMismatch: too few of the agent's own tokens could be trained.
        TooFewTrajectories: the first method of the cycle has fewer rows than the configuration asks for.
    """
    config = context.config
    if _has_begun(context, method):
        return context.artifacts.rows[method.rows]
    placement = await find_placement(context.memory, config, context.seams.inspect_hardware)
    material = Material(
        trajectories=await read_episodes(context, method),
        corrections=await context.read_corrections(),
        tokenizer=await asyncio.to_thread(load_tokenizer, context.memory.policies.get(0).base_model),
        config=config,
        max_length_tokens=placement.max_length_tokens(method.loss),
        base_model=context.memory.policies.get(0).base_model,
        policy=await find_start(context, method),
        branch_points=context.artifacts.branch_points.get(name_round(context, method), ()),
        num_not_by_a_teacher=await asyncio.to_thread(_count_not_by_a_teacher, context),
        examples=await context.read_examples(),
    )
    built = await asyncio.to_thread(method.build, material)
    mismatch = "" if has_own_tokens(built) else describe_mismatch(built, material.base_model)
    # a later method or round may have too few rows, or none that hold what was captured: it is skipped in `train`
    if _needs_rows(context, method):
        if mismatch:
            raise TemplateMismatch(mismatch)
        _require_enough(method, built, config, len(material.trajectories))
    elif mismatch:
        leave_out_all(built, "template_mismatch")
    rows_path = _rows_path(context, method)
    if built.rows:
        write_rows(built.rows, rows_path)
    else:
        # those of the round before
        rows_path.unlink(missing_ok=True)
    summary = RowsSummary.model_validate(
        {
            "num_rows": len(built.rows),
            "num_examples": built.num_examples,
            "num_tasks": built.num_tasks,
            "max_length_tokens": material.max_length_tokens,
            "own_tokens": built.own_tokens,
            "trained_tokens": built.trained_tokens,
            "trained_share": built.trained_share,
            **({"template_mismatch": mismatch} if mismatch else {}),
            **built.details(),
            "tally": dict(built.counts),
            "teachers": count_rows(built.teachers, context.key_names()),
            "trajectory_ids": built.trajectory_ids,
        }
    )
    # after the file: the summary says that the rows can be read
    await context.save_artifacts(**{method.rows: summary})
    return summary


def _has_begun(context: CycleContext, method: Method) -> bool:
    """Whether the training of this round has begun, which keeps the rows that it was specified with."""
    # built anew they may differ, by a thumb that arrived meanwhile: the finished adapter would be of another spec. The
    # version is reserved after the rows of its round were written
    is_specified = name_round(context, method) in context.artifacts.versions
    return is_specified and method.rows in context.artifacts.rows and _rows_path(context, method).exists()


async def read_episodes(context: CycleContext, method: Method) -> list[GradedTrajectory]:
    """Return the episodes that a method learns from."""
    return await context.read_pool(
        this_cycle_only=method.reads_new_episodes_only(context.config), with_branches=method.play_on is not None
    )


def _needs_rows(context: CycleContext, method: Method) -> bool:
    """Whether the cycle has no adapter without this training."""
    return context.artifacts.methods[0] == method.name and not context.artifacts.num_rounds.get(method.name)


def name_round(context: CycleContext, method: Method) -> str:
    """Return the name of a method's training, which is that of the round that it is at."""
    number = context.artifacts.num_rounds.get(method.name, 0)
    return f"{method.name}.{number + 1}" if number else method.name


def _rows_path(context: CycleContext, method: Method) -> Path:
    return context.directory / f"{method.rows}.jsonl"


def _count_not_by_a_teacher(context: CycleContext) -> int:
    """Return how many rewarded trajectories, corrections and imported examples count for no weights, because of who
    gave them."""
    trajectories = context.memory.trajectories
    rewarded, by_teachers = trajectories.count_learnable(), trajectories.count_learnable(is_for_weights=True)
    num_rewarded = sum(rewarded.get(it, 0) - by_teachers.get(it, 0) for it in context.config.pool_environments)
    num_imported = context.memory.examples.count_without_teacher(environments=context.config.pool_environments)
    return num_rewarded + context.memory.feedback.count_corrections_without_teacher() + num_imported


def _require_enough(method: Method, built: BuiltRows[Any], config: OptimizerConfig, num_trajectories: int) -> None:
    num_examples, min_rows = built.num_examples, method.min_rows(config)
    if num_examples >= min_rows:
        return
    raise TooFewTrajectories(
        f"{num_examples} {method.rows} could be made of {num_trajectories} trajectories and {min_rows} are needed: "
        f"{min_rows - num_examples} are missing (left out: {_list_reasons(built.counts) or 'nothing'}); play more "
        f"practice episodes, give feedback on logged ones, import {method.rows}, or lower {method.rows}.min_rows",
        num_missing=min_rows - num_examples,
    )


def _list_reasons(counts: Counter[str]) -> str:
    return ", ".join(
        f"{reason} {count}" for reason, count in counts.most_common() if reason not in ("used", "clean", "fork")
    )


async def train(context: CycleContext, method: Method) -> TrainedAdapter | None:
    """Train an adapter on the rows of a method and draft the policy that serves it; None with too few rows.

    Adapters are not stacked from cycle to cycle: a method continues an adapter of this cycle, or starts from the root.
    """
    config, summary = context.config, context.artifacts.rows[method.rows]
    if not _needs_rows(context, method) and not summary.has_enough(method.min_rows(config)):
        return None
    # free memory is measured anew: exploration may have taken an hour since the rows were built
    placement = await find_placement(context.memory, config, context.seams.inspect_hardware)
    spec = await _specify(context, method, placement)
    if method.continues:
        spec = await _add_early_adapters(context, spec, name=name_round(context, method))
    trained = await _train_and_register(context, spec, method)
    # after the last adapter: versions are drafted in order, and the final adapter reserved the lowest
    for early in spec.early_adapters:
        await _register(context, spec.at(early), note=f"{method.note}, after {early.share:.0%} of the steps")
    if method.continues:
        # the root is no candidate
        versions = [] if spec.parent in (None, context.artifacts.root) else [spec.parent]
        await choose_policy(context, [*versions, *(early.version for early in spec.early_adapters), spec.version])
    return trained


async def build_rows_and_train(context: CycleContext, method: Method) -> TrainedAdapter | None:
    """Build the rows of a method, then train on them; None with too few rows."""
    await build_rows(context, method)
    return await train(context, method)


async def explore(context: CycleContext, method: Method) -> None:
    """Let the policy that a method continues make its own mistakes on the practice tasks."""
    await practice.explore(context, await find_start(context, method))


async def find_start(context: CycleContext, method: Method) -> int:
    """Return the version of the policy that a method continues: the one chosen last in this cycle, else the one trained
    last, else the cycle's root."""
    artifacts = context.artifacts
    if not method.continues:
        return artifacts.root
    # saved: a repeated stage would find the policy that the method itself has chosen
    if method.name not in artifacts.starts:
        before = artifacts.methods[: artifacts.methods.index(method.name)]
        trained = [artifacts.trained[name].policy for name in before if name in artifacts.trained]
        version = max(trained, default=artifacts.root)
        chosen = None if artifacts.selection is None else artifacts.selection.chosen
        if chosen is not None and any(name in artifacts.starts for name in before):
            version = chosen
        await context.save_artifacts(starts={**artifacts.starts, method.name: version})
    return context.artifacts.starts[method.name]


async def nominate(context: CycleContext) -> int:
    """Make a policy of this cycle the candidate: the chosen one, else the one trained last. Return its version."""
    artifacts = context.artifacts
    version = artifacts.candidate
    if version is None and artifacts.selection is not None:
        version = artifacts.selection.chosen
    if version is None:
        # versions rise with the order of trainings; the control of the cycle is no candidate
        version = max(artifacts.trained[name].policy for name in artifacts.methods if name in artifacts.trained)
    # a repeated stage finds the policy moved already
    if context.memory.policies.get(version).stage is PolicyStage.DRAFT:
        await context.memory.policies.move(version, PolicyStage.CANDIDATE)
    await context.save_artifacts(candidate=version)
    return version


async def _specify(context: CycleContext, method: Method, placement: Placement) -> TrainingSpec:
    """Return the spec of a training: the recipe's, with as many steps as its rows need and as memory allows."""
    config, recipe, policies = context.config, placement.recipe, context.memory.policies
    rows_path = _rows_path(context, method)
    # of the rows on disk, which are the ones the trainer will read
    lengths = await asyncio.to_thread(lambda: [count_tokens(row) for row in read_rows(rows_path)])
    # a round's rows are worth less with each step away from the policy that sampled them
    min_steps = recipe.min_steps if config.find_rounds(method.name) is None else 0
    parent = policies.get(await find_start(context, method))
    parent_adapter = None if parent.adapter_path is None else Path(parent.adapter_path)
    # lineage: the episodes behind the adapter that is continued are behind this one as well
    inherited, plan = [], config.plan_training(recipe, method.kind, len(lengths), min_steps=min_steps)
    if parent_adapter is not None:
        manifest = read_manifest(parent_adapter)
        inherited = manifest.trajectory_ids
        plan |= {name: manifest.settings[name] for name in ("lora_rank", "lora_alpha")}
    name = name_round(context, method)
    version = await _reserve_version(context, name)
    return TrainingSpec(
        kind=method.kind,
        name=config.name,
        version=version,
        base_model=policies.get(0).base_model,
        output_dir=context.adapter_directory(version),
        work_dir=context.directory / "training" / name,
        rows_path=rows_path,
        parent=parent.version,
        parent_adapter=parent_adapter,
        trajectory_ids=sorted({*inherited, *context.artifacts.rows[method.rows].trajectory_ids}),
        **plan,
        beta=recipe.methods[method.kind].beta,
        sft_weight=recipe.methods[method.kind].sft_weight,
        **method.choose_loss(config),
        rows_per_pass=placement.rows_per_pass(method.loss, max(lengths)),
        visible_device=placement.visible_device,
    )


async def _add_early_adapters(context: CycleContext, spec: TrainingSpec, *, name: str) -> TrainingSpec:
    """Have an adapter written after each epoch but the last, so that the best can be chosen by playing."""
    num_epochs = math.ceil(spec.epochs)
    early = []
    # no early adapters where nothing can be played to choose among them
    for number in range(1, num_epochs) if context.config.num_selection_tasks and context.config.environment else ():
        version = await _reserve_version(context, f"{name}-{number}")
        output_dir = context.adapter_directory(version)
        early.append(EarlyAdapter(version=version, output_dir=output_dir, share=number / num_epochs))
    return spec.model_copy(update={"early_adapters": early})


async def _reserve_version(context: CycleContext, name: str) -> int:
    """Return the version that this training's policy will have, which names its adapter before the policy exists."""
    policies, reserved = context.memory.policies.select(), context.artifacts.versions
    mine = reserved.get(name)
    if mine is not None and not any(p.version == mine and p.cycle_id != context.cycle_id for p in policies):
        return mine
    # reserved ones too, whose policies do not exist yet. A version never comes again: vLLM keys its prefix cache by an
    # adapter's name and path (vLLM#42125)
    version = max([*(policy.version for policy in policies), *reserved.values()]) + 1
    # left by a cycle that died before it registered: nothing was ever served from it
    shutil.rmtree(context.adapter_directory(version), ignore_errors=True)
    await context.save_artifacts(**{f"{name}{VERSION_SUFFIX}": version})
    return version


@asynccontextmanager
async def _open_training_window(context: CycleContext, spec: TrainingSpec) -> AsyncIterator[None]:
    """Keep the engine stopped during the training, where that is configured and there is something to train."""
    if context.config.gpu != "window" or read_finished(spec) is not None:
        yield
        return
    await context.report_progress(0, 1, "waiting until the engine is idle")
    # nobody is served inside the window, so it must hold nothing but the training
    async with context.seams.open_window(f"training {spec.name}-v{spec.version} ({spec.kind})"):
        yield


async def _train_and_register(context: CycleContext, spec: TrainingSpec, method: Method) -> TrainedAdapter:
    """Train, and draft the policy that serves the adapter; both are skipped when they were done before."""

    async def on_step(step: dict[str, Any]) -> None:
        message = f"loss {step['loss']:.3f}"
        for name, key in MEASURES:
            if key in step:
                message += f", {name} {step[key]:.2f}"
                break
        await context.report_progress(step["step"], step["total"], message)

    # the engine is back before the policy is drafted
    async with _open_training_window(context, spec):
        # idempotent by the digest of the spec (launch.read_finished): a repeated stage gets the finished adapter
        manifest = await context.seams.train(spec, on_step=on_step, num_attempts=context.config.training_attempts)
    policy = await _register(context, spec, note=method.note)
    trained = TrainedAdapter(
        policy=policy.version, adapter=str(spec.output_dir), metrics=manifest.metrics, settings=manifest.settings
    )
    await context.save_artifacts(**{method.name: trained})
    return trained


async def _register(context: CycleContext, spec: TrainingSpec, *, note: str) -> Policy:
    """Draft the policy that serves the adapter, unless that was done before.

    Raises:
        OptimizerError: another cycle or an operator has drafted a policy of the reserved version meanwhile.
    """
    policy = next((p for p in context.memory.policies.select() if p.adapter_path == str(spec.output_dir)), None)
    if policy is None:
        policy = await context.memory.policies.draft(
            adapter_path=str(spec.output_dir),
            adapter_digest=digest_adapter(spec.output_dir),
            system_prompt=context.memory.policies.active().system_prompt,
            parent=spec.parent,
            cycle_id=context.cycle_id,
            note=note,
        )
    # the adapter directory is named after the reserved version, and adapters are immutable
    if policy.version != spec.version:
        raise OptimizerError(
            f"policy v{spec.version} was drafted by someone else while it was trained; start another cycle"
        )
    return policy
