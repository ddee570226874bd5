"""The contents of a cycle's release report: its data, its trainings, and the numbers behind the verdict.

Flow: the release gate hands over an `Evaluation` -> `build_report` -> `optimizer.cycle.report_page` writes the files.
Nothing is decided here; methods and policies are reported as they are passed in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter

from memory.scopes import EVERYBODY
from memory.teaching import TeacherKind
from optimizer.cycle.artifacts import Critiques, RowsSummary, Selection, TrainedAdapter
from optimizer.cycle.context import CycleContext
from optimizer.cycle.stages import Method
from optimizer.evaluation.cells import CellResult, CellSummary
from optimizer.evaluation.comparisons import ComparedCells, PlayedPolicy, Saving, compare_cells, measure_saving
from optimizer.evaluation.decision import Verdict
from optimizer.evaluation.intervals import PairedDifference
from optimizer.verifier.report import HOME, read_newest


@dataclass(frozen=True, kw_only=True)
class Regression(PairedDifference):
    """Candidate and incumbent on held-out tasks of another environment that was learned from."""

    environment: str


@dataclass(frozen=True)
class PlayFigures:
    """How the gate played."""

    temperature: float
    serving_temperature: float
    num_tries: int
    held_out_offset: int


@dataclass(frozen=True)
class GateFigures:
    """The figures of the gate itself: its look, its error budget, and how it played."""

    look: int | None
    """None: no test was made."""
    alpha: float
    alpha_spent: float
    """Of `alpha_budget`, by all looks at this incumbent."""
    alpha_budget: float
    regressions: list[Regression] = field(default_factory=list)
    sealed: CellSummary | None = None
    """The sealed block as the promoted policy plays it; None where it was not played."""
    sealed_touches: int = 0
    """How often it was played, this time included."""
    play: PlayFigures | None = None
    """None where clients played; `report.json` has its fields among the others."""


@dataclass(frozen=True)
class Evaluation:
    """Everything that the release gate hands over to be reported."""

    cells: Mapping[str, CellResult]
    """By the name of the cell."""
    policies: Sequence[PlayedPolicy]
    """In the order of their trainings, the base first; empty where only the two contestants were played."""
    methods: Sequence[Method]
    verdict: Verdict
    gate: GateFigures
    control: PlayedPolicy | None = None


@dataclass(frozen=True)
class ChosenMethods:
    """The methods of learning of the cycle, and a sentence for people that says why."""

    names: list[str]
    reason: str


class InsightFigures(BaseModel):
    """One insight that practice in this environment supports."""

    model_config = ConfigDict(from_attributes=True, frozen=True)

    kind: str
    text: str
    strength: int
    wins: int
    losses: int
    wins_otherwise: int
    losses_otherwise: int


@dataclass(frozen=True)
class Ancestor:
    """One policy of the candidate's line, from the candidate back to the base."""

    policy: str
    note: str
    adapter: str | None


@dataclass(frozen=True)
class Report:
    """The whole report. Its field names, and those below it, are a stored format; `report.json` is `to_json`."""

    cycle: str
    opened_at: str
    environment: str
    """Empty where clients played."""
    pool: str
    """A sentence for people: whose episodes the weights learn from."""
    methods: ChosenMethods
    verdict: Verdict
    gate: GateFigures
    cells: dict[str, CellSummary]
    comparisons: list[ComparedCells]
    saving: Saving | None
    rows: dict[str, RowsSummary | None]
    """By the name of the rows; None where the cycle did not get to build them."""
    verifier: dict[str, Any] | None
    """The report of the verifier whose grades were learned from."""
    selection: Selection | None
    training: dict[str, TrainedAdapter]
    """By the name of the method."""
    insights: list[InsightFigures]
    critiques: Critiques | None
    stage_seconds: dict[str, float]
    lineage: list[Ancestor]
    settings: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return plain values. The rows of each method stand under their own name; of trajectory ids, the number."""
        # fallback: a value of an unexpected type becomes its text instead of failing the cycle at its end
        plain = TypeAdapter(Report).dump_python(self, mode="json", by_alias=True, fallback=str)
        rows = {
            name: {} if summary is None else {**summary, "trajectory_ids": len(summary["trajectory_ids"])}
            for name, summary in plain.pop("rows").items()
        }
        gate = plain["gate"]
        gate |= gate.pop("play") or {}
        return {**plain, **rows, "verdict": self.verdict.to_json()}


def build_report(context: CycleContext, evaluation: Evaluation) -> Report:
    """Return the report of a cycle whose verdict is known."""
    artifacts, methods = context.artifacts, evaluation.methods
    kinds = {teacher["teacher"] for summary in artifacts.rows.values() for teacher in summary.teachers}
    policies, insights = context.memory.policies, context.memory.insights
    return Report(
        cycle=context.cycle_id,
        opened_at=context.opened_at.isoformat(),
        environment=context.config.environment,
        pool=artifacts.pool,
        methods=ChosenMethods(artifacts.methods, artifacts.methods_reason),
        verdict=evaluation.verdict,
        gate=evaluation.gate,
        cells={name: result.summary() for name, result in evaluation.cells.items()},
        comparisons=compare_cells(evaluation.cells, evaluation.policies, evaluation.control),
        saving=measure_saving(evaluation.cells, evaluation.policies),
        rows={method.rows: artifacts.rows.get(method.rows) for method in methods},
        verifier=read_newest(context.memory.data_dir / HOME) if TeacherKind.VERIFIER in kinds else None,
        selection=artifacts.selection,
        training={
            method.name: artifacts.trained[method.name] for method in methods if method.name in artifacts.trained
        },
        insights=[
            InsightFigures.model_validate(insight)
            for insight in insights.active(context.config.environment, scope=EVERYBODY)
        ],
        critiques=artifacts.critiques,
        stage_seconds=artifacts.stage_seconds,
        lineage=[
            Ancestor(policy.name, policy.note, policy.adapter_path)
            for policy in policies.lineage(artifacts.candidate_version)
        ],
        settings=context.settings,
    )
