"""Graders made of graders: all of them, or their weighted mean.

Invariant: where a part cannot grade, the whole does not either: no part is left out of a reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, Field

from runtime.engine.client import ToolDefinition
from runtime.environments.base import Outcome
from runtime.environments.graders.base import Grader, GradingResources, Submission

# A part is any grader, a composed one included: the union stands in registry.py, which completes these classes.
if TYPE_CHECKING:
    from runtime.environments.graders.registry import AnyGrader


class All(Grader):
    """Every part must be satisfied: the reward is the least of theirs. A part that gives 0 ends it, so name the cheap
    ones first."""

    type: Literal["all"]
    graders: list[AnyGrader] = Field(min_length=1)

    async def grade(self, submission: Submission, resources: GradingResources) -> Outcome:
        least = Outcome(1.0, "")
        reasons = []
        for grader in self.graders:
            outcome = await grader.grade(submission, resources)
            reasons.append(outcome.reason)
            least = min(least, outcome, key=lambda each: each.value)
            if least.value == 0.0:
                break
        # A full reward has all reasons; a smaller one the reason why it is small.
        return least if least.value < 1.0 else Outcome(1.0, "; ".join(reasons))

    def check(self, tools: Sequence[ToolDefinition], resources: GradingResources, *, has_database: bool) -> None:
        for grader in self.graders:
            grader.check(tools, resources, has_database=has_database)

    @property
    def needs_critic(self) -> bool:
        return any(grader.needs_critic for grader in self.graders)


class Part(BaseModel, extra="forbid"):
    """A grader with its weight."""

    weight: float = Field(gt=0, allow_inf_nan=False)
    grader: AnyGrader


class Weighted(Grader):
    """The mean of the parts' rewards by their weights, which need not sum to 1."""

    type: Literal["weighted"]
    parts: list[Part] = Field(min_length=1)

    async def grade(self, submission: Submission, resources: GradingResources) -> Outcome:
        outcomes = [await part.grader.grade(submission, resources) for part in self.parts]
        reasons = [f"{outcome.value:g}: {outcome.reason}" for outcome in outcomes]
        return Outcome(self.mean([outcome.value for outcome in outcomes]), "; ".join(reasons))

    def mean(self, rewards: Sequence[float]) -> float:
        """Return the mean of the parts' rewards by their weights."""
        # As shares of the heaviest: a sum of large weights may be infinite.
        heaviest = max(part.weight for part in self.parts)
        shares = [part.weight / heaviest for part in self.parts]
        total = sum(share * reward for share, reward in zip(shares, rewards, strict=True))
        # Rounding may leave the mean of full rewards a digit above 1.
        return min(1.0, total / sum(shares))

    def check(self, tools: Sequence[ToolDefinition], resources: GradingResources, *, has_database: bool) -> None:
        for part in self.parts:
            part.grader.check(tools, resources, has_database=has_database)

    @property
    def needs_critic(self) -> bool:
        return any(part.grader.needs_critic for part in self.parts)
