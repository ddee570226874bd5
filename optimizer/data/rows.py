"""Rows to train on, of any method: the material they are built from, their files, and the filters all methods share.

Everything that is left out is counted under a reason, so that a report can say where the data went. A row is never cut
to a length: one that is too long is left out.

Flow: trajectories -> stitched rows -> memory segment removed -> filters -> caps -> rows.
Invariant: no held-out task ever enters; token ids are the engine's own.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from memory.datasets.examples import TaughtExample
from memory.formats.content import ExampleKind
from memory.records.feedback import Correction
from optimizer.config import (
    DemonstrationConfig,
    LabelConfig,
    OptimizerConfig,
    PreferenceConfig,
    RoundsConfig,
    TeachingConfig,
)
from optimizer.data.shares import Teachers, choose_rows
from optimizer.data.stitching import Tokenizer, Unstitchable
from optimizer.rewards import GradedTrajectory

RowT = TypeVar("RowT")

LEAST_TRAINED_SHARE = 0.95
"""Of the agent's own tokens. With less, the chat template is at fault, and a cycle would teach fragments."""


@dataclass(frozen=True)
class Material:
    """Everything that the rows of a method can be built from."""

    trajectories: Sequence[GradedTrajectory]
    corrections: Sequence[Correction]
    tokenizer: Tokenizer
    config: OptimizerConfig
    max_length_tokens: int
    """Longer rows are left out."""
    base_model: str
    policy: int = 0
    """The version of the policy that will be trained, for methods that learn from its own rollouts alone."""
    num_not_by_a_teacher: int = 0
    """Rewarded trajectories, corrections and imported examples that were left out because of who gave them."""
    branch_points: Sequence[Any] = ()
    """The steps at which a search branched, as `optimizer.data.branches.BranchPoint`."""
    examples: Mapping[ExampleKind, Sequence[TaughtExample]] = field(default_factory=dict)
    """Imported examples by kind; a kind without any may be absent."""


@dataclass
class BuiltRows(Generic[RowT]):
    """The rows of one method, and the reasons for which everything else was left out."""

    rows: list[RowT] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    """Number of rows used, and of trajectories or rows left out, by reason."""
    teachers: list[Teachers] = field(default_factory=list)
    """The teachers behind each row."""
    num_tasks: int = 0
    own_tokens: int = 0
    """Tokens that the agent sampled in all usable episodes that fit the length, before the caps; 0 where the method
    takes no memory segment out of a prompt."""
    trained_tokens: int = 0
    """How many of them can be trained: their prompt could be rid of its memory segment."""
    untrained: Counter[str] = field(default_factory=Counter)
    """The others, by the reason for which their row was left out."""

    @property
    def trained_share(self) -> float:
        return self.trained_tokens / self.own_tokens if self.own_tokens else 1.0

    @property
    def trajectory_ids(self) -> list[str]:
        """The ids of all trajectories behind the rows, sorted."""
        raise NotImplementedError

    @property
    def num_examples(self) -> int:
        """The number that is compared with the fewest a training needs."""
        return len(self.rows)

    def details(self) -> dict[str, object]:
        """Return the figures that only this method's report has."""
        return {}


def require_trusted(each: GradedTrajectory | Correction) -> None:
    """Raise Unstitchable for an episode that untrusted text had a part in."""
    if not each.trajectory.may_teach:
        raise Unstitchable("untrusted")


def require_imitable(each: GradedTrajectory) -> None:
    """Raise Unstitchable for an episode that nothing should imitate: a failure, or one with broken calls."""
    if not each.is_success:
        raise Unstitchable("not_a_success")
    require_trusted(each)
    if each.trajectory.num_invalid_tool_calls > 0:
        raise Unstitchable("invalid_tool_calls")
    # a reply cut by a limit has no end token: imitated, it teaches to break off
    if any(step.finish_reason == "length" for step in each.model_steps):
        raise Unstitchable("cut_output")


def has_own_tokens(built: BuiltRows[Any]) -> bool:
    """Whether enough of the agent's own tokens can be trained."""
    return built.trained_share >= LEAST_TRAINED_SHARE


def describe_mismatch(built: BuiltRows[Any], base_model: str) -> str:
    """Return why too few of the agent's own tokens can be trained, and the mend."""
    reason, num_tokens = built.untrained.most_common(1)[0]
    return (
        f"only {built.trained_share:.1%} of the agent's own tokens in the usable episodes can be trained "
        f"({built.trained_tokens} of {built.own_tokens}), {LEAST_TRAINED_SHARE:.0%} are needed: the chat template of "
        f"{base_model!r} does not render prompts as the engine captured them (most often {reason!r}, {num_tokens} "
        "tokens); make the chat template in the model's directory the one that the engine serves with, or learn by "
        "`sft` alone with demonstrations.keep_memory_share at 1, which leaves the memory segment in the prompts"
    )


def leave_out_all(built: BuiltRows[Any], reason: str) -> None:
    """Leave out all rows, for one reason."""
    built.counts[reason] += len(built.rows)
    built.counts["used"] = 0
    built.rows, built.teachers = [], []


def describe_own_tokens(summary: Mapping[str, Any]) -> list[str]:
    """Return the sentences of a report about the agent's own tokens, where the method counted any."""
    if summary.get("template_mismatch"):
        return [f"The rows were left out: {summary['template_mismatch']}."]
    if not summary.get("own_tokens"):  # also a cycle opened by an older version
        return []
    return [
        f"{summary['trained_share']:.1%} of the agent's own tokens in the usable episodes can be trained "
        f"({summary['trained_tokens']} of {summary['own_tokens']})."
    ]


def bound_rows(
    built: BuiltRows[RowT],
    config: DemonstrationConfig | PreferenceConfig | LabelConfig | RoundsConfig,
    teaching: TeachingConfig,
    seed: int,
    *,
    floor: int | None = None,
) -> None:
    """Leave out the rows over a teacher's bounds, then those over the total. `floor`: the rows that one teacher may
    give in any case; None: as many as a training needs."""
    # order: the bounds of teachers first; a sample taken before would keep the share of a flood
    floor = config.min_rows if floor is None else floor
    kept = choose_rows(built.teachers, teaching, floor=floor, seed=seed, counts=built.counts)
    if len(kept) > config.max_rows:
        built.counts["over_total_cap"] += len(kept) - config.max_rows
        # seeded: a repeated stage must write the same file, or the digest of its training changes
        kept = sorted(random.Random(seed).sample(kept, config.max_rows))
    built.rows = [built.rows[position] for position in kept]
    built.teachers = [built.teachers[position] for position in kept]
    built.counts["used"] = len(built.rows)


def write_rows(rows: Sequence[Any], path: Path) -> None:
    """Write each row, a dataclass, as one line of JSON; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # renamed at the end: a torn file would be trained on after a crash
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w", encoding="utf-8") as lines:
        for row in rows:
            lines.write(json.dumps(asdict(row), separators=(",", ":")) + "\n")
    unfinished.replace(path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read what `write_rows` wrote."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def count_tokens(row: dict[str, Any]) -> int:
    """Return the length in tokens of a row that `read_rows` read; of a preference, with its longer side."""
    if "input_ids" in row:
        return len(row["input_ids"])
    # both sides are padded to the longer one; the same sum as training/dpo.py, measure
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def list_counts(counts: Mapping[str, int]) -> str:
    """Return the reasons and their numbers as a report shows them, the most frequent first."""
    return ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items(), key=lambda it: -it[1]) if count)
