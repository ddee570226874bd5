"""The stages of a cycle up to its candidate, each a function of the workshop; the last two are in
`optimizer.release_gate`. Each can be repeated: what it made is found again.

Refuses to know the order: that is the graph in `optimizer.cycle`.
"""

from __future__ import annotations

import asyncio
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from memory.adapters import digest_adapter
from memory.schema import Policy, PolicyStage
from optimizer.config import Recipe, choose_recipe
from optimizer.data import build_demonstrations, build_preferences, write_rows
from optimizer.errors import OptimizerError, TooFewTrajectories
from optimizer.practice import explore as play_exploration
from optimizer.practice import practice
from optimizer.training.base import count_parameters, locate_base
from optimizer.training.spec import TrainingSpec
from optimizer.workshop import Workshop


async def collect(shop: Workshop) -> None:
    """Play practice tasks no earlier cycle has seen, and put what is learned into words."""
    for environment in shop.config.learn_from:
        shop.take_held_out(environment, 0)  # an unknown name fails here, not after an hour of training
    if "practice_offset" not in shop.artifacts:
        earlier = [cycle for cycle in shop.memory.cycles.list() if cycle.id != shop.cycle_id]
        offset = max((cycle.artifacts.get("practice_end", 0) for cycle in earlier), default=0)
        await shop.keep(practice_offset=offset, practice_end=offset + shop.config.num_practice_tasks)
    await practice(shop)


async def demonstrate(shop: Workshop) -> None:
    """Build the rows to imitate from everything ever lived in this cycle's environments.

    Raises:
        TooFewTrajectories: there are fewer rows than the configuration asks for.
    """
    config = shop.config
    pool = await shop.read_pool()
    corrections = await shop.read_corrections()
    built = await asyncio.to_thread(
        build_demonstrations,
        pool,
        await _load_tokenizer(shop),
        config=config.demonstrations,
        max_length_tokens=config.max_length_tokens,
        seed=config.seed,
        corrections=corrections,
    )
    _require_enough(len(built.rows), config.demonstrations.min_rows, len(pool), built.tally)
    write_rows(built.rows, shop.directory / "demonstrations.jsonl")
    await shop.keep(
        demonstrations={
            "num_rows": len(built.rows),
            "num_tasks": built.num_tasks,
            "num_corrections": built.num_corrections,
            "num_with_memory": sum(row.has_memory for row in built.rows),
            "tokens_shown": built.tokens_shown,
            "tokens_kept": built.tokens_kept,
            "tally": dict(built.tally),
            "trajectory_ids": built.trajectory_ids,
        }
    )


def _require_enough(num_rows: int, min_rows: int, num_trajectories: int, tally: Counter[str]) -> None:
    if num_rows >= min_rows:
        return
    reasons = ", ".join(f"{reason} {count}" for reason, count in tally.most_common() if reason not in ("used", "clean"))
    raise TooFewTrajectories(
        f"{num_rows} demonstrations could be made of {num_trajectories} trajectories and {min_rows} are needed: "
        f"{min_rows - num_rows} are missing (left out: {reasons or 'nothing'}); play more practice episodes, give "
        "feedback on logged ones, or lower demonstrations.min_rows",
        num_missing=min_rows - num_rows,
    )


async def train_sft(shop: Workshop) -> None:
    """Train an adapter on the demonstrations, from the bare base: adapters are not stacked from cycle to cycle."""
    recipe = choose_base_recipe(shop)
    spec = await _specify(
        shop,
        "sft",
        recipe,
        rows_path=shop.directory / "demonstrations.jsonl",
        trajectory_ids=shop.artifacts["demonstrations"]["trajectory_ids"],
        parent=0,
        learning_rate=recipe.sft_learning_rate,
        epochs=recipe.sft_epochs,
        batch_size=recipe.sft_batch_size,
    )
    await _train_and_register(shop, spec, note="SFT on its own successes")


async def explore(shop: Workshop) -> None:
    """Let the SFT policy make its own mistakes."""
    await play_exploration(shop, shop.artifacts["sft"]["policy"])


async def train_dpo(shop: Workshop) -> None:
    """Train on preferences, from the SFT adapter; with too few of them the SFT policy itself becomes the candidate.

    Where the SFT policy explored, its own mistakes are weighed. Where nothing was explored there are only those of the
    policies that were logged.
    """
    config, sft = shop.config, shop.artifacts["sft"]
    built = await asyncio.to_thread(
        build_preferences,
        await shop.read_pool(this_cycle_only=config.explore_episodes > 0),
        await _load_tokenizer(shop),
        config=config.preferences,
        max_length_tokens=config.max_length_tokens,
        seed=config.seed,
    )
    await shop.keep(preferences={"num_rows": len(built.rows), "num_tasks": built.num_tasks, "tally": dict(built.tally)})
    if len(built.rows) < config.preferences.min_rows:
        await _nominate(shop, sft["policy"])
        return
    write_rows(built.rows, shop.directory / "preferences.jsonl")
    recipe = choose_base_recipe(shop)
    spec = await _specify(
        shop,
        "dpo",
        recipe,
        rows_path=shop.directory / "preferences.jsonl",
        trajectory_ids=sorted({*built.trajectory_ids, *shop.artifacts["demonstrations"]["trajectory_ids"]}),
        parent=sft["policy"],
        parent_adapter=Path(sft["adapter"]),
        learning_rate=recipe.dpo_learning_rate,
        epochs=recipe.dpo_epochs,
        batch_size=recipe.dpo_batch_size,
        beta=recipe.dpo_beta,
        sft_weight=recipe.dpo_sft_weight,
    )
    policy = await _train_and_register(shop, spec, note="DPO from the SFT adapter")
    await _nominate(shop, policy.version)


def choose_base_recipe(shop: Workshop) -> Recipe:
    """Return the training settings that fit the size of the base."""
    base_dir = locate_base(shop.memory.policies.get(0).base_model)
    return choose_recipe(count_parameters(base_dir), shop.config.recipe)


async def _load_tokenizer(shop: Workshop) -> Any:
    def load() -> Any:
        from transformers import AutoTokenizer  # seconds of import that only a cycle needs

        return AutoTokenizer.from_pretrained(locate_base(shop.memory.policies.get(0).base_model))

    return await asyncio.to_thread(load)


async def _specify(shop: Workshop, kind: str, recipe: Recipe, **fields: Any) -> TrainingSpec:
    config = shop.config
    version = await _reserve_version(shop, kind)
    return TrainingSpec(
        kind=kind,
        name=config.name,
        version=version,
        base_model=shop.memory.policies.get(0).base_model,
        output_dir=shop.adapters / f"{config.name}-v{version}",
        work_dir=shop.directory / "training" / kind,
        lora_rank=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        rows_per_pass=recipe.rows_per_pass,
        gradient_checkpointing=recipe.gradient_checkpointing,
        seed=config.seed,
        device=config.device,
        dtype=config.dtype,
        num_threads=config.num_threads,
        **fields,
    )


async def _reserve_version(shop: Workshop, kind: str) -> int:
    """Return the version that this training will be registered as: its adapter's name must be known before."""
    policies = shop.memory.policies.list()
    reserved = shop.artifacts.get(f"{kind}_version")
    if reserved is not None and not any(p.version == reserved and p.cycle_id != shop.cycle_id for p in policies):
        return reserved
    version = max(policy.version for policy in policies) + 1
    # left by a cycle that died before it registered: nothing was ever served from it
    shutil.rmtree(shop.adapters / f"{shop.config.name}-v{version}", ignore_errors=True)
    await shop.keep(**{f"{kind}_version": version})
    return version


async def _train_and_register(shop: Workshop, spec: TrainingSpec, *, note: str) -> Policy:
    """Train, and draft the policy that wears the adapter; both are skipped when they were done before."""

    async def on_step(told: dict[str, Any]) -> None:
        accuracy = told.get("rewards/accuracies", told.get("mean_token_accuracy", 0.0))
        await shop.tell(told["step"], told["total"], f"loss {told['loss']:.3f}, accuracy {accuracy:.2f}")

    manifest = await shop.seams.train(spec, on_step=on_step, num_attempts=shop.config.training_attempts)
    policy = next((p for p in shop.memory.policies.list() if p.adapter_path == str(spec.output_dir)), None)
    if policy is None:
        policy = await shop.memory.policies.draft(
            adapter_path=str(spec.output_dir),
            adapter_digest=digest_adapter(spec.output_dir),
            system_prompt=shop.memory.policies.active().system_prompt,
            parent=spec.parent,
            cycle_id=shop.cycle_id,
            note=note,
        )
    if policy.version != spec.version:
        raise OptimizerError(
            f"policy v{spec.version} was drafted by someone else while it was trained; start another cycle"
        )
    made = {"policy": policy.version, "adapter": str(spec.output_dir)}
    await shop.keep(**{spec.kind: {**made, "metrics": manifest.metrics, "settings": manifest.settings}})
    return policy


async def _nominate(shop: Workshop, version: int) -> None:
    if shop.memory.policies.get(version).stage is PolicyStage.DRAFT:
        await shop.memory.policies.move(version, PolicyStage.CANDIDATE)
    await shop.keep(candidate=version)
