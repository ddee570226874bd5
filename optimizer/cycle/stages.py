"""The stages of a cycle up to its candidate, each a function of the context; the last two are in
`optimizer.cycle.release_gate`. Each can be repeated: what it made is found again.

Refuses to know the order: that is the graph in `optimizer.cycle`.
"""

from __future__ import annotations

import asyncio
import math
import shutil
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from memory.adapters import digest_adapter
from memory.schema import Policy, PolicyStage
from optimizer.config import plan_steps
from optimizer.cycle.context import CycleContext
from optimizer.cycle.practice import explore as play_exploration
from optimizer.cycle.practice import practice
from optimizer.cycle.selection import choose_policy
from optimizer.data.rows import (
    DemonstrationRows,
    build_demonstrations,
    build_preferences,
    count_tokens,
    read_rows,
    write_rows,
)
from optimizer.data.shares import count_rows
from optimizer.errors import OptimizerError, TemplateMismatch, TooFewTrajectories
from optimizer.placement import Placement, place_training
from optimizer.training.base import locate_base
from optimizer.training.footprint import Kind
from optimizer.training.launch import read_finished
from optimizer.training.spec import EarlyAdapter, TrainingSpec

LEAST_TRAINED_SHARE = 0.95
"""Of the agent's own tokens. With less, something is wrong with the template, and a cycle would teach fragments."""


async def collect(context: CycleContext) -> None:
    """Play practice tasks no earlier cycle has seen, and put what is learned into words."""
    for environment in context.config.learn_from:
        context.take_held_out(environment, 0)  # an unknown name fails here, not after an hour of training
    if "practice_offset" not in context.artifacts:
        earlier = [cycle for cycle in context.memory.cycles.select() if cycle.id != context.cycle_id]
        offset = max((cycle.artifacts.get("practice_end", 0) for cycle in earlier), default=0)
        await context.keep(practice_offset=offset, practice_end=offset + context.config.num_practice_tasks)
    await practice(context)


async def demonstrate(context: CycleContext) -> None:
    """Build the rows to imitate from everything ever lived in this cycle's environments.

    Raises:
        TemplateMismatch: too few of the agent's own tokens could be trained.
        TooFewTrajectories: there are fewer demonstrations than the configuration asks for.
    """
    config = context.config
    pool = await context.read_pool()
    corrections = await context.read_corrections()
    placement = await place_training(context.memory, config, context.seams)
    built = await asyncio.to_thread(
        build_demonstrations,
        pool,
        await _load_tokenizer(context),
        config=config.demonstrations,
        max_length_tokens=placement.max_length_tokens("sft"),
        seed=config.seed,
        corrections=corrections,
        teaching=config.teaching,
    )
    _require_own_tokens(built, context.memory.policies.get(0).base_model)
    built.tally["not_by_a_teacher"] = await asyncio.to_thread(_count_without_teacher, context)
    _require_enough(built.num_examples, config.demonstrations.min_rows, len(pool), built.tally)
    write_rows(built.rows, context.directory / "demonstrations.jsonl")
    await context.keep(
        demonstrations={
            "num_rows": len(built.rows),
            "num_examples": built.num_examples,
            "own_tokens": built.own_tokens,
            "trained_tokens": built.trained_tokens,
            "trained_share": built.trained_share,
            "num_tasks": built.num_tasks,
            "max_length_tokens": placement.max_length_tokens("sft"),
            "num_corrections": built.num_corrections,
            "num_with_memory": sum(row.has_memory for row in built.rows),
            "tokens_shown": built.tokens_shown,
            "tokens_kept": built.tokens_kept,
            "tally": dict(built.tally),
            "teachers": count_rows(built.teachers, context.key_names()),
            "trajectory_ids": built.trajectory_ids,
        }
    )


def _require_own_tokens(built: DemonstrationRows, base_model: str) -> None:
    if built.trained_share >= LEAST_TRAINED_SHARE:
        return
    reason, num_tokens = built.untrained.most_common(1)[0]
    raise TemplateMismatch(
        f"only {built.trained_share:.1%} of the agent's own tokens in the usable episodes can be trained "
        f"({built.trained_tokens} of {built.own_tokens}), {LEAST_TRAINED_SHARE:.0%} are needed: the chat template of "
        f"{base_model!r} does not render prompts as the engine captured them (most often {reason!r}, {num_tokens} "
        "tokens); make the chat template in the model's directory the one that the engine serves with, or set "
        "demonstrations.keep_memory_share to 1 to leave the memory segment in the prompts"
    )


def _count_without_teacher(context: CycleContext) -> int:
    """Return how many rewarded trajectories and corrections count for no weights, because of who gave the feedback."""
    trajectories = context.memory.trajectories
    rewarded, by_teachers = trajectories.count_learnable(), trajectories.count_learnable(is_for_weights=True)
    num_rewarded = sum(rewarded.get(it, 0) - by_teachers.get(it, 0) for it in context.config.pool_environments)
    return num_rewarded + context.memory.feedback.count_corrections_without_teacher()


def _require_enough(num_rows: int, min_rows: int, num_trajectories: int, tally: Counter[str]) -> None:
    if num_rows >= min_rows:
        return
    reasons = ", ".join(
        f"{reason} {count}" for reason, count in tally.most_common() if reason not in ("used", "clean", "fork")
    )
    raise TooFewTrajectories(
        f"{num_rows} demonstrations could be made of {num_trajectories} trajectories and {min_rows} are needed: "
        f"{min_rows - num_rows} are missing (left out: {reasons or 'nothing'}); play more practice episodes, give "
        "feedback on logged ones, or lower demonstrations.min_rows",
        num_missing=min_rows - num_rows,
    )


async def train_sft(context: CycleContext) -> None:
    """Train an adapter on the demonstrations, from the bare base: adapters are not stacked from cycle to cycle."""
    placement = await place_training(context.memory, context.config, context.seams)
    recipe = placement.recipe
    spec = await _specify(
        context,
        "sft",
        placement,
        rows_path=context.directory / "demonstrations.jsonl",
        trajectory_ids=context.artifacts["demonstrations"]["trajectory_ids"],
        parent=0,
        learning_rate=recipe.sft_learning_rate,
        epochs=recipe.sft_epochs,
        batch_size=recipe.sft_batch_size,
    )
    await _train_and_register(context, spec, note="SFT on its own successes")


async def explore(context: CycleContext) -> None:
    """Let the SFT policy make its own mistakes."""
    await play_exploration(context, context.artifacts["sft"]["policy"])


async def train_dpo(context: CycleContext) -> None:
    """Train on preferences, from the SFT adapter; with too few of them the SFT policy itself becomes the candidate.

    Where the SFT policy explored, its own mistakes are weighed. Where nothing was explored there are only those of the
    policies that were logged.
    """
    config, sft = context.config, context.artifacts["sft"]
    placement = await place_training(context.memory, config, context.seams)
    recipe = placement.recipe
    built = await asyncio.to_thread(
        build_preferences,
        await context.read_pool(this_cycle_only=config.explore_episodes > 0),
        await _load_tokenizer(context),
        config=config.preferences,
        max_length_tokens=placement.max_length_tokens("dpo"),
        seed=config.seed,
        corrections=await context.read_corrections(),
        teaching=config.teaching,
    )
    await context.keep(
        preferences={
            "num_rows": len(built.rows),
            "num_tasks": built.num_tasks,
            "tally": dict(built.tally),
            "teachers": count_rows(built.teachers, context.key_names()),
        }
    )
    if len(built.rows) < config.preferences.min_rows:
        await _nominate(context, sft["policy"])
        return
    write_rows(built.rows, context.directory / "preferences.jsonl")
    spec = await _specify(
        context,
        "dpo",
        placement,
        rows_path=context.directory / "preferences.jsonl",
        trajectory_ids=sorted({*built.trajectory_ids, *context.artifacts["demonstrations"]["trajectory_ids"]}),
        parent=sft["policy"],
        parent_adapter=Path(sft["adapter"]),
        learning_rate=recipe.dpo_learning_rate,
        epochs=recipe.dpo_epochs,
        batch_size=recipe.dpo_batch_size,
        beta=recipe.dpo_beta,
        sft_weight=recipe.dpo_sft_weight,
    )
    spec = await _add_early_adapters(context, spec)
    await _train_and_register(context, spec, note="DPO from the SFT adapter")
    for early in spec.early_adapters:
        await _register(context, spec.at(early), note=f"DPO from the SFT adapter, after {early.share:.0%} of the steps")
    versions = [sft["policy"], *(early.version for early in spec.early_adapters), spec.version]
    await _nominate(context, await choose_policy(context, versions))


async def _add_early_adapters(context: CycleContext, spec: TrainingSpec) -> TrainingSpec:
    """Have an adapter left behind after each epoch but the last, so that the best can be chosen by playing."""
    num_epochs = math.ceil(spec.epochs)
    early = []
    for number in range(1, num_epochs) if context.config.num_selection_tasks and context.config.environment else ():
        version = await _reserve_version(context, f"dpo-{number}")
        output_dir = context.adapter_directory(version)
        early.append(EarlyAdapter(version=version, output_dir=output_dir, share=number / num_epochs))
    return spec.model_copy(update={"early_adapters": early})


async def _load_tokenizer(context: CycleContext) -> Any:
    def load() -> Any:
        from transformers import AutoTokenizer  # seconds of import that only a cycle needs

        return AutoTokenizer.from_pretrained(locate_base(context.memory.policies.get(0).base_model))

    return await asyncio.to_thread(load)


async def _specify(
    context: CycleContext,
    kind: Kind,
    placement: Placement,
    *,
    rows_path: Path,
    batch_size: int,
    epochs: float,
    **fields: Any,
) -> TrainingSpec:
    """Return the spec of a training: the recipe's, with as many steps as its rows need and as room allows."""
    config, recipe = context.config, placement.recipe
    lengths = await asyncio.to_thread(lambda: [count_tokens(row) for row in read_rows(rows_path)])
    batch_size, epochs = plan_steps(len(lengths), batch_size=batch_size, epochs=epochs, min_steps=recipe.min_steps)
    version = await _reserve_version(context, kind)
    return TrainingSpec(
        kind=kind,
        name=config.name,
        version=version,
        base_model=context.memory.policies.get(0).base_model,
        output_dir=context.adapter_directory(version),
        work_dir=context.directory / "training" / kind,
        rows_path=rows_path,
        batch_size=batch_size,
        epochs=epochs,
        lora_rank=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        rows_per_pass=placement.rows_per_pass(kind, max(lengths)),
        visible_device=placement.visible_device,
        gradient_checkpointing=recipe.gradient_checkpointing,
        seed=config.seed,
        device=config.device,
        dtype=config.dtype,
        num_threads=config.num_threads,
        **fields,
    )


async def _reserve_version(context: CycleContext, kind: str) -> int:
    """Return the version that this training will be registered as: its adapter's name must be known before."""
    policies = context.memory.policies.select()
    reserved = {name: version for name, version in context.artifacts.items() if name.endswith("_version")}
    mine = reserved.get(f"{kind}_version")
    if mine is not None and not any(p.version == mine and p.cycle_id != context.cycle_id for p in policies):
        return mine
    version = max([*(policy.version for policy in policies), *reserved.values()]) + 1
    # left by a cycle that died before it registered: nothing was ever served from it
    shutil.rmtree(context.adapter_directory(version), ignore_errors=True)
    await context.keep(**{f"{kind}_version": version})
    return version


@asynccontextmanager
async def _make_room(context: CycleContext, spec: TrainingSpec) -> AsyncIterator[None]:
    """Have the engine stopped while this trains, where that is configured and there is something to train."""
    if context.config.gpu != "window" or read_finished(spec) is not None:
        yield
        return
    await context.tell(0, 1, "waiting until the engine is idle")
    async with context.seams.open_window(f"training {spec.name}-v{spec.version} ({spec.kind})"):
        yield


async def _train_and_register(context: CycleContext, spec: TrainingSpec, *, note: str) -> Policy:
    """Train, and draft the policy that wears the adapter; both are skipped when they were done before."""

    async def on_step(told: dict[str, Any]) -> None:
        accuracy = told.get("rewards/accuracies", told.get("mean_token_accuracy", 0.0))
        await context.tell(told["step"], told["total"], f"loss {told['loss']:.3f}, accuracy {accuracy:.2f}")

    async with _make_room(context, spec):
        manifest = await context.seams.train(spec, on_step=on_step, num_attempts=context.config.training_attempts)
    policy = await _register(context, spec, note=note)
    made = {"policy": policy.version, "adapter": str(spec.output_dir)}
    await context.keep(**{spec.kind: {**made, "metrics": manifest.metrics, "settings": manifest.settings}})
    return policy


async def _register(context: CycleContext, spec: TrainingSpec, *, note: str) -> Policy:
    """Draft the policy that serves the adapter, unless that was done before."""
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
    if policy.version != spec.version:
        raise OptimizerError(
            f"policy v{spec.version} was drafted by someone else while it was trained; start another cycle"
        )
    return policy


async def _nominate(context: CycleContext, version: int) -> None:
    if context.memory.policies.get(version).stage is PolicyStage.DRAFT:
        await context.memory.policies.move(version, PolicyStage.CANDIDATE)
    await context.keep(candidate=version)
