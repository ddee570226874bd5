"""Trains the control of a cycle: SFT on every success of the cycle, those of exploration included.

A method that explores learns from episodes that the SFT before it had not seen, so what it wins more may come from
these episodes and not from the method. The control has the same episodes and nothing but SFT (rejection-sampled
fine-tuning, arXiv 2308.01825): the method is worth what it wins over the control.

Invariant: the control is played and reported beside the candidate, and never is one.
"""

from __future__ import annotations

from typing import Any

from optimizer.cycle.artifacts import CycleArtifacts
from optimizer.cycle.context import CycleContext
from optimizer.cycle.methods import list_methods
from optimizer.cycle.needs import need_demonstrations
from optimizer.cycle.report import PlayedPolicy
from optimizer.cycle.stages import Method, build_rows_and_train
from optimizer.data import demonstrations


def describe(summary: dict[str, Any]) -> list[str]:
    """Return the paragraphs of a report about the control's rows; `summary` as the cycle's row stores it."""
    return [f"Of the control: {paragraph}" for paragraph in demonstrations.describe(summary)]


CONTROL = Method(
    name="control",
    trainer="sft",
    title="SFT on all episodes",
    rows="control_rows",
    build=demonstrations.build,
    min_rows=lambda config: config.demonstrations.min_rows,
    measure_need=need_demonstrations,
    describe=describe,
    note="SFT on all successes of its cycle, as a control",
    stages=(),
    continues=False,
)


async def train_control(context: CycleContext) -> None:
    """Train the control, where the cycle trained more than SFT and there are enough rows."""
    if list_trained(context.artifacts)[1:]:
        await build_rows_and_train(context, CONTROL)


def find_control(artifacts: CycleArtifacts) -> PlayedPolicy | None:
    """Return the control that this cycle trained."""
    trained = artifacts.trained.get(CONTROL.name)
    return None if trained is None else PlayedPolicy(CONTROL.name, CONTROL.title, trained.policy)


def list_trained(artifacts: CycleArtifacts) -> list[Method]:
    """Return the methods that have trained an adapter in this cycle, without the control."""
    return [method for method in list_methods(artifacts.methods) if method.name in artifacts.trained]
