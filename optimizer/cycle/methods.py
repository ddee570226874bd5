"""The methods of learning that a cycle can apply, and the choice among them.

To add one, write a module in `optimizer.data` that counts its rows before anything is played, builds them and
describes them; a trainer in `optimizer.training` under the method's name; and an entry in `METHODS`. Its settings stand
with all others: numbers in `optimizer.recipes`, a section in `optimizer.config` (of a method that plays, a
`RoundsConfig` that names it). Stages, reports and evaluation follow. Only `optimizer.methods` chooses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from memory.formats.content import ExampleKind
from optimizer.config import OptimizerConfig
from optimizer.cycle.branching import play_branches
from optimizer.cycle.context import CycleContext
from optimizer.cycle.rounds import train_in_rounds
from optimizer.cycle.stages import Method, MethodStage, build_rows, build_rows_and_train, explore, train
from optimizer.data import branches, demonstrations, groups, labels, preferences, rollouts
from optimizer.data.needs import LoggedData, Need
from optimizer.errors import OptimizerError
from optimizer.training.footprint import PAIRWISE, UNPAIRED


def _choose_preference_loss(config: OptimizerConfig) -> dict[str, str | float]:
    wanted = config.preferences
    if wanted.loss == "sigmoid":  # the usual one, which a spec does not name
        return {}
    return {"loss": wanted.loss, **({"discount": wanted.discount} if wanted.loss == "dmpo" else {})}


EXPLORE = MethodStage("explore", explore, is_needed=lambda config: bool(config.explore_episodes))

# Names are stored in artifacts and manifests, and cells are called `<name>-on`, so a name has no hyphen; settings spell
# `<name>_epochs`, so it has no underscore.
METHODS: tuple[Method, ...] = (
    Method(
        name="sft",
        title="SFT",
        rows="demonstrations",
        build=demonstrations.build,
        min_rows=lambda config: config.demonstrations.min_rows,
        measure_need=demonstrations.measure_need,
        describe=demonstrations.describe,
        note="SFT on its own successes",
        stages=(MethodStage("demonstrate", build_rows), MethodStage("sft", train)),
        continues=False,
    ),
    Method(
        name="dpo",
        title="DPO",
        rows="preferences",
        build=preferences.build,
        min_rows=lambda config: config.preferences.min_rows,
        measure_need=preferences.measure_need,
        describe=preferences.describe,
        note="DPO on decisions that its tries weigh",
        stages=(EXPLORE, MethodStage("dpo", build_rows_and_train)),
        loss=PAIRWISE,
        choose_loss=_choose_preference_loss,
        # without exploration, only the mistakes of logged policies can be compared
        reads_new_episodes_only=lambda config: config.explore_episodes > 0,
    ),
    Method(
        name="kto",
        title="KTO",
        rows="labels",
        build=labels.build,
        min_rows=lambda config: config.labels.min_rows,
        measure_need=labels.measure_need,
        describe=labels.describe,
        note="KTO on good and bad answers",
        stages=(EXPLORE, MethodStage("kto", build_rows_and_train)),
        loss=UNPAIRED,
    ),
    Method(
        name="grpo",
        title="GRPO",
        rows="groups",
        build=groups.build,
        min_rows=lambda config: config.groups.min_rows,
        measure_need=groups.measure_need,
        describe=groups.describe,
        note="GRPO on groups of its own rollouts",
        stages=(MethodStage("grpo", train_in_rounds),),
        reads_new_episodes_only=lambda config: True,
    ),
    Method(
        name="distill",
        title="Distillation",
        rows="rollouts",
        build=rollouts.build,
        min_rows=lambda config: config.rollouts.min_rows,
        measure_need=rollouts.measure_need,
        describe=rollouts.describe,
        note="on-policy distillation from itself with memory",
        stages=(MethodStage("distill", train_in_rounds),),
        reads_new_episodes_only=lambda config: True,
        plays_with_memory=True,
    ),
    Method(
        name="search",
        title="Search",
        rows="branches",
        build=branches.build,
        min_rows=lambda config: config.branches.min_rows,
        measure_need=branches.measure_need,
        describe=branches.describe,
        note="DPO on ways on from steps of its own episodes",
        stages=(MethodStage("search", train_in_rounds),),
        play_on=play_branches,
        loss=PAIRWISE,
        reads_new_episodes_only=lambda config: True,
    ),
)


def describe_control(summary: dict[str, Any]) -> list[str]:
    """Return the paragraphs of a report about the control's rows; `summary` as the cycle's row stores it."""
    return [f"Of the control: {paragraph}" for paragraph in demonstrations.describe(summary)]


CONTROL = Method(
    name="control",
    trainer="sft",
    title="SFT on all episodes",
    rows="control_rows",
    build=demonstrations.build,
    min_rows=lambda config: config.demonstrations.min_rows,
    measure_need=demonstrations.measure_need,
    describe=describe_control,
    note="SFT on all successes of its cycle, as a control",
    stages=(),
    continues=False,
)
"""SFT on every success of a cycle, those of exploration included (rejection-sampled fine-tuning, arXiv 2308.01825).

A method that explores learns from episodes that the SFT before it had not seen, so what it wins more may come from
these and not from the method. It is worth what it wins over the control, which is played beside the candidate, and is
never one.
"""


async def train_control(context: CycleContext) -> None:
    """Train the control, where the cycle trained by several methods and there are enough rows."""
    if len(set(context.artifacts.methods) & set(context.artifacts.trained)) > 1:
        await build_rows_and_train(context, CONTROL)


@dataclass(frozen=True)
class Choice:
    """The methods of a cycle, in their order, and a sentence for people that says why."""

    methods: tuple[str, ...]
    reason: str


def list_methods(names: Sequence[str]) -> list[Method]:
    """Return the methods of these names, in the order of the names.

    Raises:
        OptimizerError: there is none of a name: the cycle was opened by another version.
    """
    by_name = {method.name: method for method in METHODS}
    for name in names:
        if name not in by_name:
            raise OptimizerError(f"there is no method of learning {name!r}, of another version: start another cycle")
    return [by_name[name] for name in names]


def choose_methods(logged: LoggedData) -> Choice:
    """Return the configured methods, else those that the data allows.

    Where something will be played, practice brings demonstrations and exploration brings pairs; imported labels are
    learned from besides. Otherwise the log decides: pairs are learned from by DPO, and labels without pairs by KTO,
    after SFT if there are demonstrations.
    """
    config = logged.config
    if config.methods:
        return _describe(config.methods, "as `optimizer.methods` says")
    if config.practice_episodes or config.explore_episodes:
        played = f"{config.practice_episodes} episodes of practice and {config.explore_episodes} of exploration"
        reason = f"{played} are to be played, which bring demonstrations and pairs"
        num_labels = logged.num_imported.get(ExampleKind.LABEL, 0)
        if min(logged.num_imported_good, num_labels - logged.num_imported_good) < config.labels.min_rows:
            return _describe(("sft", "dpo"), reason)
        return _describe(("sft", "dpo", "kto"), f"{reason}, and {num_labels} labels were imported")
    sft, dpo, kto = list_methods(("sft", "dpo", "kto"))
    needs = {method.name: method.measure_need(logged, ()) for method in (sft, dpo, kto)}
    counts = ", ".join(_count(need) for need in needs.values())
    chosen = [name for name in ("sft",) if needs[name].is_met]
    chosen += [name for name in ("dpo", "kto") if needs[name].is_met][:1]
    # with nothing to learn from, the cycle is refused with the need of the first
    return _describe(chosen or ("sft",), f"the log has {counts}")


def _describe(names: Sequence[str], reason: str) -> Choice:
    titles = ", then ".join(method.title for method in list_methods(names))
    return Choice(tuple(names), f"methods of learning: {titles}, because {reason}")


def _count(need: Need) -> str:
    return f"{need.available} {need.name} ({need.needed} needed)"
