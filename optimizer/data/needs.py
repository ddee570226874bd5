"""The needs of a cycle, known before anything is played. The modules of the rows (`measure_need`) do the counting.

A count is what is logged and the most that playing can add, so a cycle is rejected only where it cannot train whatever
its practice brings. The exact rows are built later, by `optimizer.data`, which may leave some out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from memory.formats.content import ExampleKind
from memory.records.feedback import Correction
from memory.records.trajectories import GradedTrajectory
from memory.schema import Trajectory
from memory.store import Memory
from optimizer.config import OptimizerConfig
from optimizer.errors import CannotReplay, TooFewTrajectories, TrainingDoesNotFit

CAPACITY = "room to train"
"""The name of the need for memory on a GPU; shown by the HTTP API."""
REPLAY = "replay"
"""The name of the need for an environment that can be replayed."""


@dataclass(frozen=True)
class Need:
    """One thing that a cycle needs, and how much of it there is."""

    name: str
    needed: int
    available: int
    playable: int = 0
    """How many playing can add at the most."""
    is_required: bool = False
    """Without it the cycle cannot train."""
    detail: str = ""
    mend: str = ""

    @property
    def num_missing(self) -> int:
        return max(0, self.needed - self.available - self.playable)

    @property
    def is_met(self) -> bool:
        return self.num_missing == 0

    def to_json(self) -> dict[str, object]:
        # num_missing is a property, which asdict leaves out
        return {**asdict(self), "num_missing": self.num_missing}


@dataclass(frozen=True)
class LoggedData:
    """Everything in the log that weights may learn from in a cycle with these settings."""

    learnable: Sequence[GradedTrajectory]
    corrections: Sequence[Correction]
    active: int
    """The version of the policy that will play."""
    config: OptimizerConfig
    num_imported: Mapping[ExampleKind, int] = field(default_factory=dict)
    """Imported examples by kind."""
    num_imported_good: int = 0
    """Imported labels that say "good"."""

    @classmethod
    def read(cls, memory: Memory, config: OptimizerConfig) -> LoggedData:
        """Read the database: call this in a thread."""
        environments = config.pool_environments
        return cls(
            memory.trajectories.learnable(environments=environments, is_for_weights=True),
            memory.feedback.corrections(limit=config.max_pool, environments=environments, is_for_weights=True),
            memory.policies.active().version,
            config,
            {kind: memory.examples.count_learnable(kind, environments=environments) for kind in ExampleKind},
            memory.examples.count_learnable(ExampleKind.LABEL, environments=environments, is_good=True),
        )


def require_needs(needs: Iterable[Need]) -> None:
    """Raise TrainingDoesNotFit, CannotReplay or TooFewTrajectories for a required need that is not met."""
    for need in needs:
        if need.is_met or not need.is_required:
            continue
        if need.name == CAPACITY:
            raise TrainingDoesNotFit(need.detail)
        if need.name == REPLAY:
            raise CannotReplay(need.detail)
        raise TooFewTrajectories(explain(need), num_missing=need.num_missing)


def explain(need: Need) -> str:
    """Return the missing number and its remedy in one sentence."""
    return (
        f"{need.detail}; {need.needed} {need.name} are needed and playing can add {need.playable} at the most: "
        f"{need.num_missing} are missing; {need.mend}"
    )


MeasureNeed = Callable[[LoggedData, Sequence[int]], Need]
"""(logged episodes, rounds of practice to come) -> the rows that a method needs and those it can get."""


def require_reachable(
    memory: Memory, config: OptimizerConfig, measure_need: MeasureNeed, rounds_left: Sequence[int]
) -> None:
    """Check that the remaining rounds can still bring enough rows. Reads the database: call it in a thread.

    Raises:
        TooFewTrajectories: they cannot.
    """
    require_needs([replace(measure_need(LoggedData.read(memory, config), rounds_left), is_required=True)])


def count_capped(trajectories: Iterable[Trajectory], per_task: int) -> int:
    return sum(min(per_task, number) for number in Counter(it.task_key for it in trajectories).values())
