"""Trains a verifier on graded episodes, measures it, and has it grade the episodes that nobody graded.

Flow: graded episodes -> rows, split by task -> LoRA on the base -> margins -> calibration -> report; later: ungraded
episodes -> margins -> rewards of the source "verifier".
Invariants: no task is in two parts, and nothing of a held-out task in any. A verifier's grades count for rows of
training data alone (memory/records/trajectory_queries.py): no gate, no exemplar and no lesson sees them.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from memory.held_out import is_episode_held_out
from memory.names import path_below
from memory.records.trajectories import GradedTrajectory
from memory.schema import RewardSource, Trajectory
from memory.storage.whole_files import write_whole
from memory.store import Memory
from optimizer.config import OptimizerConfig
from optimizer.data.rows import write_rows
from optimizer.data.stitching import Tokenizer, Unstitchable
from optimizer.errors import TooFewTrajectories
from optimizer.recipes import choose_recipe
from optimizer.rewards import grade
from optimizer.seams import Train
from optimizer.training.base import load_tokenizer, locate_base
from optimizer.training.footprint import read_shape
from optimizer.training.launch import OnStep, score, train
from optimizer.training.spec import TrainingSpec
from optimizer.verifier.calibration import Calibration, fit
from optimizer.verifier.report import HOME, describe, describe_part, find_newest, measure
from optimizer.verifier.rows import (
    Question,
    VerifierExample,
    build_examples,
    frame_question,
    render_episode,
    split_by_task,
    to_row,
)

LEAST_OF_A_KIND = 4
"""Good episodes, and bad ones, in each part: with fewer there is neither a threshold nor a measurement."""
NAME = "verifier"


class Score(Protocol):
    async def __call__(self, spec: TrainingSpec, *, on_step: OnStep | None = None) -> list[float]:
        """Return the margin of each row of the spec."""
        ...


@dataclass(frozen=True)
class VerifierSetup:
    """Where a verifier is made, and from what."""

    memory: Memory
    config: OptimizerConfig
    environments: Sequence[str]
    """The environments whose episodes are learned from and graded; `""` stands for live traffic."""
    train: Train = train
    score: Score = score
    on_step: OnStep | None = None

    @property
    def home(self) -> Path:
        return path_below(self.memory.data_dir, HOME)

    def directory(self, version: int) -> Path:
        return path_below(self.memory.data_dir, HOME, f"v{version}")

    def newest(self) -> int:
        """Return the number of the newest verifier that was measured; 0 if there is none."""
        return find_newest(self.home)

    def next(self) -> int:
        """Return a number that no verifier has had, one that was not finished included."""
        return max((int(path.name[1:]) for path in self.home.glob("v*")), default=0) + 1

    def base_model(self) -> str:
        """Return the base model. Raises: ValueError."""
        base_model = self.memory.policies.find_base_model()
        if base_model is None:
            raise ValueError("this data directory has no base model yet: start `serve.py serve` on it once")
        return base_model


async def run_verifier(
    memory: Memory,
    config: OptimizerConfig,
    environments: Sequence[str],
    *,
    limit: int | None = None,
    on_step: OnStep | None = None,
) -> dict[str, Any]:
    """Train a verifier, or with a `limit` have the newest one grade so many episodes; return the report. Without
    `environments`, of those that the configuration names. Raises: ValueError, OptimizerError."""
    if not environments and "environment" not in config.model_fields_set:
        raise ValueError("nothing says whose episodes: give --environment NAME, or --logged for live traffic")
    setup = VerifierSetup(memory, config, environments or config.pool_environments, on_step=on_step)
    return await (train_verifier(setup) if limit is None else grade_ungraded(setup, limit=limit))


async def train_verifier(setup: VerifierSetup) -> dict[str, Any]:
    """Train, calibrate and measure a verifier; return its report, which is stored beside it.

    Raises:
        TooFewTrajectories: a part has too few good or bad episodes.
        TrainingError: a trainer died. ValueError: the base cannot be asked.
    """
    base_model = setup.base_model()
    graded = await asyncio.to_thread(_read_graded, setup)
    tokenizer = await asyncio.to_thread(load_tokenizer, base_model)
    question, counts = frame_question(tokenizer), Counter[str]()
    shape = await asyncio.to_thread(lambda: read_shape(locate_base(base_model)))
    max_length_tokens = setup.config.max_length_tokens or shape.max_position_embeddings
    examples = build_examples(
        graded,
        tokenizer,
        question,
        per_task=setup.config.labels.per_task,
        max_length_tokens=max_length_tokens,
        counts=counts,
    )
    parts = split_by_task(examples, setup.config.seed)
    _require_enough(parts)
    version = setup.next()
    spec = _specify(setup, version, base_model, shape.num_parameters, parts["training"], question)
    await setup.train(spec, on_step=setup.on_step, num_attempts=setup.config.training_attempts)
    calibrating, test = parts["calibration"], parts["test"]
    prompts = [_ask(each, question) for each in (*calibrating, *test)]
    prompts += [_ask(each, question, is_base=True) for each in test]
    margins = await _score(setup, spec, prompts)
    judges, positions = _choose_judges(calibrating)
    calibration = fit([margins[it] for it in positions], [calibrating[it].is_success for it in positions])
    measured, base_margins = margins[len(calibrating) : -len(test)], margins[-len(test) :]
    report = {
        "object": "verifier",
        "version": version,
        "base_model": base_model,
        "environments": list(setup.environments),
        "adapter": str(spec.output_dir),
        "max_length_tokens": max_length_tokens,
        "counts": dict(counts),
        "parts": {name: describe_part(part) for name, part in parts.items()},
        "calibration": asdict(calibration),
        "calibrated_on": judges,
        **measure(test, measured, base_margins, calibration, setup.config.seed),
    }
    report["description"] = describe(report)
    _write_report(setup.directory(version), spec, report)
    return report


async def grade_ungraded(setup: VerifierSetup, *, limit: int) -> dict[str, Any]:
    """Have the newest verifier grade episodes that have no reward; return how many it found good and bad.

    Raises:
        ValueError: there is no verifier, or it was made for another base or other environments.
    """
    version = setup.newest()
    if version == 0:
        raise ValueError("there is no verifier yet: `serve.py verifier train` makes one")
    directory = setup.directory(version)
    report = json.loads((directory / "report.json").read_text(encoding="utf-8"))
    _require_same_world(setup, report)
    spec = TrainingSpec.model_validate_json((directory / "spec.json").read_text(encoding="utf-8"))
    tokenizer = await asyncio.to_thread(load_tokenizer, report["base_model"])
    question, counts = frame_question(tokenizer), Counter[str]()
    prompts = await asyncio.to_thread(
        _render_ungraded, setup, tokenizer, question, report["max_length_tokens"], limit, counts
    )
    examples = [VerifierExample(trajectory.id, trajectory.task_key, ids, False, False) for trajectory, ids in prompts]
    margins = await _score(setup, spec, [_ask(each, question) for each in examples])
    calibration = Calibration(**report["calibration"])
    decisions = calibration.decide(margins).tolist()
    for each, is_success, probability in zip(
        examples, decisions, calibration.probabilities(margins).tolist(), strict=True
    ):
        reason = f"verifier v{version}: {probability:.2f}, a success from {calibration.threshold:.2f} on"
        await setup.memory.trajectories.reward(
            each.trajectory_id, float(is_success), RewardSource.VERIFIER, reason=reason
        )
    return {
        "object": "verifier.grading",
        "version": version,
        "num_good": sum(decisions),
        "num_bad": len(decisions) - sum(decisions),
        "left_out": dict(counts),
    }


def _read_graded(setup: VerifierSetup) -> list[GradedTrajectory]:
    limit = setup.config.max_pool
    graded = grade(setup.memory, environments=setup.environments, limit=limit, is_for_weights=True)
    measures = setup.memory.trajectories.held_out_tasks()
    return [each for each in graded if not is_episode_held_out(measures, each.trajectory)]


def _require_enough(parts: dict[str, list[VerifierExample]]) -> None:
    for name, part in parts.items():
        num_good = sum(each.is_success for each in part)
        num_bad = len(part) - num_good
        fewest = min(num_good, num_bad)
        if fewest < LEAST_OF_A_KIND:
            raise TooFewTrajectories(
                f"a verifier needs {LEAST_OF_A_KIND} good and {LEAST_OF_A_KIND} bad episodes for {name}, and there are "
                f"{num_good} and {num_bad} of {len({each.task for each in part})} tasks: reward more episodes, of more "
                "tasks; three fifths of the tasks train, a fifth calibrates and a fifth measures",
                num_missing=LEAST_OF_A_KIND - fewest,
            )


def _choose_judges(calibrating: Sequence[VerifierExample]) -> tuple[str, list[int]]:
    """Return whose rewards the calibration is fitted to, and the positions of their episodes: those of people where
    they are enough, because its probabilities should say what a person would; else all."""
    by_people = [position for position, each in enumerate(calibrating) if each.is_by_person]
    num_good = sum(calibrating[it].is_success for it in by_people)
    if min(num_good, len(by_people) - num_good) >= LEAST_OF_A_KIND:
        return "people", by_people
    return "all", list(range(len(calibrating)))


def _specify(
    setup: VerifierSetup,
    version: int,
    base_model: str,
    num_parameters: int,
    examples: Sequence[VerifierExample],
    question: Question,
) -> TrainingSpec:
    """Write the rows and return the spec: that of SFT, whose only trained token is the answer."""
    config, directory = setup.config, setup.directory(version)
    recipe = choose_recipe(num_parameters, config.recipe)
    rows_path = directory / "rows.jsonl"
    write_rows([to_row(each, question) for each in examples], rows_path)
    return TrainingSpec(
        kind="sft",
        name=NAME,
        version=version,
        base_model=base_model,
        rows_path=rows_path,
        output_dir=directory / "adapter",
        work_dir=directory / "training",
        trajectory_ids=sorted(each.trajectory_id for each in examples),
        **config.plan_training(recipe, "sft", len(examples), min_steps=recipe.min_steps),
        rows_per_pass=recipe.rows_per_pass,
        # One GPU: TRL would wrap the model in DataParallel, which it refuses.
        visible_device=config.gpu if config.gpu.isdecimal() else "0",
    )


@dataclass(frozen=True)
class Prompt:
    """One row of a scoring."""

    input_ids: list[int]
    answers: tuple[int, int]
    """Token ids of yes and no."""
    is_base: bool
    """Whether the untrained base is asked."""


def _ask(example: VerifierExample, question: Question, *, is_base: bool = False) -> Prompt:
    return Prompt(example.prompt_ids, (question.yes, question.no), is_base)


async def _score(setup: VerifierSetup, spec: TrainingSpec, prompts: Sequence[Prompt]) -> list[float]:
    """Return the margin of each prompt."""
    if not prompts:
        return []
    work_dir = spec.work_dir.parent / "scoring"
    rows_path = work_dir / "rows.jsonl"
    write_rows(prompts, rows_path)
    where = {"rows_path": rows_path, "work_dir": work_dir, "parent_adapter": spec.output_dir}
    return await setup.score(spec.model_copy(update={"kind": "score", **where}), on_step=setup.on_step)


def _render_ungraded(
    setup: VerifierSetup,
    tokenizer: Tokenizer,
    question: Question,
    max_length_tokens: int,
    limit: int,
    counts: Counter[str],
) -> list[tuple[Trajectory, list[int]]]:
    trajectories = setup.memory.trajectories
    measures, prompts = trajectories.held_out_tasks(), []
    for trajectory in trajectories.ungraded(setup.environments, limit=limit):
        try:
            if is_episode_held_out(measures, trajectory):
                raise Unstitchable("held_out")
            steps = trajectories.steps(trajectory.id)
            prompts.append((trajectory, render_episode(trajectory, steps, tokenizer, question, max_length_tokens)))
        except Unstitchable as reason:
            counts[str(reason)] += 1
    return prompts


def _require_same_world(setup: VerifierSetup, report: dict[str, Any]) -> None:
    base_model, environments = setup.base_model(), set(setup.environments)
    if report["base_model"] != base_model:
        raise ValueError(
            f"verifier v{report['version']} is one of {report['base_model']!r}, and the policies here of "
            f"{base_model!r}: train another"
        )
    if unknown := environments - set(report["environments"]):
        raise ValueError(
            f"verifier v{report['version']} learned of {report['environments']!r} alone, and nothing of "
            f"{sorted(unknown)!r}: train one on them"
        )


def _write_report(directory: Path, spec: TrainingSpec, report: dict[str, Any]) -> None:
    (directory / "spec.json").write_text(spec.model_dump_json(indent=1), encoding="utf-8")
    # last, and whole: a directory with a report is a verifier
    write_whole(directory / "report.json", json.dumps(report, indent=1))
