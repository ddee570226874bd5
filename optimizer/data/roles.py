"""Splits a team's episode into its roles, each with the calls that it made and the credit that it gets.

The reward of an episode is each role's: all of them worked towards it, and each role learns from its own calls alone,
as in MALT (arXiv 2412.01928) and OPTIMA (arXiv 2410.08115). Departure from MALT, which values a reply by a tree of
continuations: here it is the one episode, or the tries of a task that came to the same prompt.

The checker is judged more closely where that is possible: about the very answer that was rewarded, it was right if it
accepted a success or sent a failure back. An answer that the actor then changed was not rewarded by anybody; what is
known is whether sending it back led to a success. A check that nobody can read is wrong.

Invariant: every model call is in exactly one part; the episode of a single agent is one part, which is the episode.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from memory.schema import Step, StepKind
from memory.team import Role, is_actors, read_check
from optimizer.data.stitching import SegmentEdit, Tokenizer, plan_memory_removal
from optimizer.rewards import GradedTrajectory


@dataclass(frozen=True, kw_only=True)
class RolePart(GradedTrajectory):
    """The calls of one role in an episode; of the checker, one call. `reward` and `is_success` are the role's own."""

    role: Role
    episode: GradedTrajectory
    """All of it."""

    @property
    def task_key(self) -> tuple[str, ...]:
        """The key that is equal for two parts of the same role in the same task."""
        return (*self.trajectory.task_key, self.role.value)

    @property
    def has_memory(self) -> bool:
        """Whether its prompts hold a memory segment: it is shown to the actor alone."""
        return self.role is Role.ACTOR and bool(self.trajectory.memory_text)

    def plan_memory_removal(self, tokenizer: Tokenizer) -> list[SegmentEdit]:
        """Return the edits that take the memory segment out of its prompts."""
        return plan_memory_removal(self.trajectory, tokenizer) if self.has_memory else []

    def replies_from(self, number: int) -> list[Step]:
        """Return the model call with this number and the actor's calls after it: checks decide nothing themselves."""
        call = self.model_steps[number]
        calls = (step for step in self.episode.model_steps if is_actors(step))
        return [call, *(step for step in calls if step.position > call.position)]


def split_roles(graded: Iterable[GradedTrajectory]) -> list[RolePart]:
    """Return the parts of all episodes, in their order."""
    return [part for each in graded for part in _split(each)]


def _split(each: GradedTrajectory) -> Iterator[RolePart]:
    planned = [step for step in each.steps if step.role is Role.PLANNER]
    if planned:
        yield _take(each, Role.PLANNER, planned, each.reward, each.is_success)
    yield _take(each, Role.ACTOR, [step for step in each.steps if is_actors(step)], each.reward, each.is_success)
    for step in each.model_steps:
        if step.role is Role.CHECKER:
            yield _take(each, Role.CHECKER, [step], *_credit_check(each, step))


def _take(each: GradedTrajectory, role: Role, steps: list[Step], reward: float, is_success: bool) -> RolePart:
    return RolePart(each.trajectory, steps, reward, is_success, each.teacher, each.source, role=role, episode=each)


def _credit_check(each: GradedTrajectory, check: Step) -> tuple[float, bool]:
    """Return the reward of one check, and whether it is a success."""
    decision = read_check(check.content)
    if decision is None:
        return 0.0, False
    answers = [step for step in each.steps if step.kind is StepKind.MODEL and is_actors(step) and not step.tool_calls]
    checked = [step.content for step in answers if step.position < check.position]
    if decision.accepts or checked[-1:] == [answers[-1].content]:
        is_right = decision.accepts == each.is_success
        return float(is_right), is_right
    return each.reward, each.is_success
