"""The artifacts of a cycle: the JSON object on its row, read once into typed values.

The keys of that object are a stored format, shown by the HTTP API: rename a field here only with an alias. A method of
learning adds three kinds of keys under its own names: the summary of its rows (`demonstrations`), the adapter that it
trained (`sft`) and the policy version reserved for it (`sft_version`). They are distinguished by their shape, so that a
method needs no code here.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from optimizer.data.branches import BranchPoint
from optimizer.evaluation.decision import Decision

VERSION_SUFFIX = "_version"


class RowsSummary(BaseModel):
    """Rows of one method, counted. Written when the rows are built; read by training and by the report.

    Counts that only one method has (`num_corrections`) are kept as extra fields.
    """

    model_config = ConfigDict(extra="allow", frozen=True, populate_by_name=True)

    num_rows: int = 0
    num_tasks: int = 0
    counts: dict[str, int] = Field(default_factory=dict, alias="tally")
    """Number of rows used, and of trajectories or rows left out, by reason."""
    teachers: list[dict[str, object]] = []
    """As `optimizer.data.shares.count_rows` returns them."""
    trajectory_ids: list[str] = []

    def has_enough(self, min_rows: int) -> bool:
        # an episode of several rows is one example; an older release stored the rows alone
        return (self.model_extra or {}).get("num_examples", self.num_rows) >= min_rows


class TrainedAdapter(BaseModel):
    """One finished training. Written after its policy was drafted."""

    model_config = ConfigDict(extra="allow", frozen=True)

    policy: int
    """The version that serves the adapter."""
    adapter: str = ""
    """The adapter directory."""
    metrics: dict[str, float] = {}
    settings: dict[str, object] = {}


class Selection(BaseModel):
    """Practice tasks won by each policy among which the candidate is chosen, by version."""

    model_config = ConfigDict(frozen=True)

    num_tasks: int
    num_won: dict[str, int] = {}
    chosen: int | None = None
    """None while policies are still being played."""


class Critiques(BaseModel):
    """Requests to the critic in this cycle, and how many of them failed."""

    model_config = ConfigDict(frozen=True)

    num_asked: int = 0
    num_failed: int = 0
    num_skipped: int = 0
    """Not sent, because the critic had failed again and again."""
    first_failure: str | None = None


class DecidedVerdict(BaseModel):
    """The verdict of the gate on a candidate, as the rows of the cycle and of the policy keep it.

    Written when the gate has decided; read by the API, the command line and metrics. The figures behind the decision
    are kept as extra fields, under the names of `optimizer.evaluation.decision.Verdict`.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    decision: Decision
    reason: str
    policy: int
    """The candidate's version."""
    report: str
    """The path of the page that explains it."""


class CycleArtifacts(BaseModel):
    """Everything that the stages of one cycle have produced so far."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    pool: str = ""
    """A sentence for people: whose episodes the weights learn from."""
    methods: list[str] = ["sft", "dpo"]
    """The methods of learning of this cycle, in their order; the default is that of releases with no choice."""
    methods_reason: str = ""
    """A sentence for people: why these methods."""
    stage_seconds: dict[str, float] = {}
    """By the name of the stage, in their order."""
    root: int = 0
    """The policy version that the first training starts from: the bare base, or a policy that no cycle made."""
    starts: dict[str, int] = {}
    """The policy versions that methods continue, by the name of the method."""
    practice_offset: int | None = None
    practice_end: int | None = None
    """The practice tasks of this cycle: from the offset up to, not including, the end."""
    num_practice_rounds: int = 0
    num_explore_rounds: int = 0
    """Finished rounds, which a repeated stage does not play again."""
    rounds_begun: dict[str, datetime] = {}
    """When each round of play began, by its label: what it has finished since is not played again."""
    num_rounds: dict[str, int] = {}
    num_rounds_played: dict[str, int] = {}
    """Rounds of methods that train in rounds, trained and played, by the name of the method."""
    branch_points: dict[str, list[BranchPoint]] = {}
    """The steps at which a search branches, by the number of its round."""
    critiques: Critiques | None = None
    selection_tasks: list[str] | None = None
    selection: Selection | None = None
    incumbent: int | None = None
    candidate: int | None = None
    """Policy versions that the release gate compares."""
    held_out_offset: int = 0
    look: int | None = None
    verdict: DecidedVerdict | None = None
    rows: dict[str, RowsSummary] = {}
    """By the name of the rows."""
    trained: dict[str, TrainedAdapter] = {}
    """By the name of the method."""
    versions: dict[str, int] = {}
    """Reserved policy versions, by the name of the training."""

    @classmethod
    def read(cls, stored: dict[str, Any]) -> CycleArtifacts:
        """Return the artifacts of a row, of this release or an earlier one; unknown keys are ignored.

        Raises:
            pydantic.ValidationError: a known key holds another type.
        """
        # a new field of this class takes its name from methods: one whose rows or adapter have the same name is no
        # longer found
        own = {name: value for name, value in stored.items() if name in cls.model_fields}
        others = {name: value for name, value in stored.items() if name not in own}
        objects = {name: value for name, value in others.items() if isinstance(value, dict)}
        return cls.model_validate(
            {
                **own,
                "rows": {name: value for name, value in objects.items() if "policy" not in value},
                # only a trained adapter may have a key "policy": an artifact of rows that had one would be read as an
                # adapter
                "trained": {name: value for name, value in objects.items() if "policy" in value},
                "versions": {
                    name.removesuffix(VERSION_SUFFIX): value
                    for name, value in others.items()
                    if name.endswith(VERSION_SUFFIX)
                },
            }
        )

    @classmethod
    def require_readable(cls, name: str, artifact: object) -> None:
        """Raise TypeError for an artifact that `read` would not find again under this name."""
        # what a method names is known by its shape, as in `read`; its values are no fields of their own
        is_methods = isinstance(artifact, RowsSummary | TrainedAdapter) or name.endswith(VERSION_SUFFIX)
        if not is_methods and name not in cls.model_fields.keys() - {"rows", "trained", "versions"}:
            raise TypeError(f"{name!r} is no artifact of a cycle: name a field of CycleArtifacts")

    @property
    def candidate_version(self) -> int:
        """The version that stands for promotion. Raises ValueError before there is one."""
        if self.candidate is None:
            raise ValueError("this cycle has no candidate yet: its trainings have not ended")
        return self.candidate


def to_json(artifact: object) -> Any:
    """Return an artifact as it is stored."""
    # by alias: rows store `tally`, which fields call `counts`
    return artifact.model_dump(mode="json", by_alias=True) if isinstance(artifact, BaseModel) else artifact
