"""Comparisons between the policies of one cycle, for its report: on the same tasks, and what memory costs in tokens.

Nothing is decided by them: the decision is made in `optimizer.evaluation.decision`, by two cells alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from optimizer.evaluation.cells import CellResult, HeldOutEpisode, compare_pairs, pair_tasks
from optimizer.evaluation.intervals import PairedDifference, bootstrap_mean


@dataclass(frozen=True)
class PlayedPolicy:
    """One policy of the evaluation; its cells are `<name>-off` and `<name>-on`."""

    name: str
    title: str
    version: int


@dataclass(frozen=True, kw_only=True)
class ComparedCells(PairedDifference):
    """How the success of two cells differs on the tasks that both played, for a report."""

    title: str
    first: str
    """The name of its cell."""
    second: str
    relative_gain: float | None
    """None where the second won nothing."""
    tasks_won: list[str]
    """Tasks at which the first did better."""
    tasks_lost: list[str]


@dataclass(frozen=True)
class Saving:
    """Prompt tokens of the base with memory and of the last policy without: the cost of insights before and after they
    became weights. The field names are a stored format; a `turn` in them is a model call."""

    prompt_tokens_per_turn_before: float
    prompt_tokens_per_turn_after: float
    share: float
    """Of the tokens before, how many are saved."""
    tokens_per_turn: float
    """Tokens saved in each call, the mean over tasks; `low` and `high` are its 95 % interval."""
    low: float
    high: float
    success_before: float
    success_after: float
    final: str
    """The cell of the last policy."""


def list_comparisons(
    policies: Sequence[PlayedPolicy], control: PlayedPolicy | None = None
) -> Iterator[tuple[str, str, str]]:
    """Yield (first cell, second cell, title): each training against the one before and against the base, the last
    against the control, and the effect of memory on each policy."""
    # the base must come first; an empty list has none (compare_cells asks first)
    base, *trained = policies
    for before, after in zip(policies, trained, strict=False):
        yield f"{after.name}-off", f"{before.name}-off", f"{after.title} against {before.title}, memory off"
        if before is not base:
            yield f"{after.name}-on", f"{before.name}-on", f"{after.title} against {before.title}, memory on"
    if control is not None:
        for memory in ("off", "on"):
            title = f"{policies[-1].title} against {control.title}, memory {memory}"
            yield f"{policies[-1].name}-{memory}", f"{control.name}-{memory}", title
    # the first training is compared with the base above, as its predecessor
    for policy in trained[1:]:
        yield f"{policy.name}-off", f"{base.name}-off", f"{policy.title} against {base.title}, memory off"
    for policy in trained:
        title = f"{policy.title} without memory against {base.title} with memory"
        yield f"{policy.name}-off", f"{base.name}-on", title
    for policy in policies:
        yield f"{policy.name}-on", f"{policy.name}-off", f"memory on against off, {policy.title}"


def compare_cells(
    cells: Mapping[str, CellResult], policies: Sequence[PlayedPolicy], control: PlayedPolicy | None = None
) -> list[ComparedCells]:
    """Return each comparison that both cells were played for, task by task."""
    compared = []
    for first, second, title in list_comparisons(policies, control) if policies else ():
        if first not in cells or second not in cells:
            continue
        pairs = pair_tasks(cells[first], cells[second])
        compared.append(
            ComparedCells(
                **vars(compare_pairs(pairs)),
                title=title,
                first=first,
                second=second,
                relative_gain=_relative_gain(cells[first].success, cells[second].success),
                tasks_won=[pair.task for pair in pairs if pair.gain > 0],
                tasks_lost=[pair.task for pair in pairs if pair.gain < 0],
            )
        )
    return compared


def _relative_gain(first: float, second: float) -> float | None:
    return first / second - 1 if second else None


def measure_saving(cells: Mapping[str, CellResult], policies: Sequence[PlayedPolicy]) -> Saving | None:
    """Compare the prompt tokens of the base with memory and of the last policy without. None where these cells were not
    played."""
    played = [policy for policy in policies[1:] if f"{policy.name}-off" in cells]
    if not played or f"{policies[0].name}-on" not in cells:
        return None
    before, after = cells[f"{policies[0].name}-on"], cells[f"{played[-1].name}-off"]
    tokens_before, tokens_after = before.per_call("prompt_tokens"), after.per_call("prompt_tokens")
    differences = [
        _prompt_tokens_per_call(pair.theirs) - _prompt_tokens_per_call(pair.ours) for pair in pair_tasks(after, before)
    ]
    mean, low, high = bootstrap_mean(differences)
    return Saving(
        prompt_tokens_per_turn_before=tokens_before,
        prompt_tokens_per_turn_after=tokens_after,
        share=1 - tokens_after / tokens_before if tokens_before else 0.0,
        tokens_per_turn=mean,
        low=low,
        high=high,
        success_before=before.success,
        success_after=after.success,
        final=after.cell.name,
    )


def _prompt_tokens_per_call(tries: Sequence[HeldOutEpisode]) -> float:
    return sum(episode.prompt_tokens for episode in tries) / max(1, sum(episode.num_calls for episode in tries))
