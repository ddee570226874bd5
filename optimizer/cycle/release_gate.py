"""The release gate of a cycle: plays the held-out tasks, writes the report, and moves the candidate to its stage.

The decision itself is made in `optimizer.evaluation.comparison`.
Invariants: every comparison is entered in the ledger (`memory.records.verdicts`) before its outcome is known; each
comparison plays held-out tasks of its own; the sealed block is played once, by a policy that was promoted, and decides
nothing.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from memory.schema import Policy, PolicyStage, StoredVerdict, Task, new_id
from optimizer.cycle.context import CycleContext
from optimizer.cycle.report import write_report
from optimizer.evaluation.comparison import (
    Basis,
    Cell,
    CellResult,
    Decision,
    EpisodeSummary,
    Verdict,
    alpha_of,
    compare_pairs,
    judge,
    pair_tasks,
    play_cell,
)
from optimizer.evaluation.logged import read_logged_cells


@dataclass
class Comparison:
    """One comparison of a candidate with the active policy, under way."""

    context: CycleContext
    entry: StoredVerdict
    """Its line in the ledger."""
    is_in_cycle: bool
    """False: it was asked for after the cycle had closed, whose row takes no more progress."""
    regressions: list[dict[str, Any]] = field(default_factory=list)
    sealed: CellResult | None = None

    @property
    def environment(self) -> str:
        return self.context.config.environment

    @property
    def held_out_offset(self) -> int:
        return self.entry.held_out_end - self.context.num_gate_tasks(self.environment)

    async def play(self, cell: Cell, tasks: list[Task], environment: str, *, num_tries: int) -> CellResult:
        """Play a cell, or read what was played of it before a crash."""
        context, is_in_cycle = self.context, self.is_in_cycle
        path = context.directory / f"cell-{'' if is_in_cycle else self.entry.id + '-'}{cell.name}.json"
        if not path.exists():
            trajectories = context.memory.trajectories
            played = await play_cell(
                cell,
                tasks,
                rollout=context.seams.rollout,
                grade=trajectories.reward_for_weights,
                count_model_calls=lambda trajectory_id: trajectories.measure(trajectory_id).num_model_calls,
                success_reward=trajectories.success_reward,
                concurrency=context.config.concurrency,
                temperature=context.gate_serving(environment).temperature,
                num_tries=num_tries,
                seed=context.config.seed,
                on_progress=context.tell if is_in_cycle else None,
            )
            _write_cell(path, played)
        return _read_cell(path, cell)

    async def prepare(self, tasks: list[Task]) -> None:
        """Have tasks ready to start."""
        if self.is_in_cycle:
            await self.context.prepare(tasks)
        elif tasks:
            await self.context.seams.prepare(tasks)


async def evaluate(context: CycleContext) -> None:
    """Play every cell on the same held-out tasks; a cell that was played is not played again."""
    if not context.config.environment:
        return
    if "incumbent" not in context.artifacts:
        await context.keep(incumbent=context.memory.policies.active().version)
    comparison = await _enter(context, _cycle_entry(context), context.artifacts["incumbent"], is_in_cycle=True)
    await context.keep(held_out_offset=comparison.held_out_offset, look=comparison.entry.look)
    tasks = context.held_out_tasks()
    await comparison.prepare(tasks)
    contestants = {cell.name for cell in choose_contestants(context)}
    for cell in choose_cells(context):
        await _play(comparison, cell, tasks, is_contestant=cell.name in contestants)


async def settle(context: CycleContext) -> None:
    """Judge, write the report, and let the candidate act or not. The report is there before the swap."""
    if context.config.environment:
        comparison = await _enter(context, _cycle_entry(context), context.artifacts["incumbent"], is_in_cycle=True)
        tasks = context.held_out_tasks()
        cells = {cell.name: await _play(comparison, cell, tasks, is_contestant=True) for cell in choose_cells(context)}
        summary = await _decide(comparison, cells, [cells[cell.name] for cell in choose_contestants(context)])
    else:
        summary = await _judge_by_log(context, _cycle_entry(context), is_in_cycle=True)
    shutil.rmtree(context.directory / "training", ignore_errors=True)
    await context.keep(verdict=summary)


async def judge_again(context: CycleContext) -> dict[str, Any]:
    """Compare a closed cycle's candidate with the policy that acts now, on tasks that have not decided on it; where its
    cycle played, by playing new held-out tasks, else by what clients played."""
    entry_id = new_id("ver")
    if not context.config.environment:
        return await _judge_by_log(context, entry_id, is_in_cycle=False)
    comparison = await _enter(context, entry_id, context.memory.policies.active().version, is_in_cycle=False)
    tasks = context.take_held_out(comparison.environment, comparison.held_out_offset)
    await comparison.prepare(tasks)
    contestants = _contest(context, "candidate", "incumbent", comparison.entry.incumbent)
    played = [await _play(comparison, cell, tasks, is_contestant=True) for cell in contestants]
    return await _decide(comparison, {result.cell.name: result for result in played}, played)


async def _judge_by_log(context: CycleContext, entry_id: str, *, is_in_cycle: bool) -> dict[str, Any]:
    """Judge by what clients played as the candidate and as the active policy."""
    policies = context.memory.policies
    candidate, incumbent = policies.get(context.artifacts["candidate"]), policies.active()
    comparison = await _enter(context, entry_id, incumbent.version, is_in_cycle=is_in_cycle)
    found = await asyncio.to_thread(read_logged_cells, context.memory, candidate, incumbent)
    return await _decide(comparison, {cell.cell.name: cell for cell in found}, [*found, found[0]])


def _cycle_entry(context: CycleContext) -> str:
    # always the same, so that a stage that is repeated after a crash spends nothing twice
    return f"ver_{context.cycle_id}"


async def _enter(context: CycleContext, entry_id: str, incumbent: int, *, is_in_cycle: bool) -> Comparison:
    """Enter a comparison in the ledger: its look at the incumbent, and its own block of held-out tasks."""
    environment, verdicts = context.config.environment, context.memory.verdicts
    start = verdicts.held_out_end(environment)
    entry = StoredVerdict(
        id=entry_id,
        candidate=context.artifacts["candidate"],
        incumbent=incumbent,
        cycle_id=context.cycle_id,
        environment=environment,
        held_out_end=start + context.num_gate_tasks(environment) if environment else 0,
    )
    budget = context.config.evaluation.false_promotion_rate
    entry = await verdicts.open(entry, choose_alpha=lambda look: alpha_of(look, budget))
    return Comparison(context, entry, is_in_cycle)


async def _play(comparison: Comparison, cell: Cell, tasks: list[Task], *, is_contestant: bool) -> CellResult:
    """Play a cell in the cycle's environment. Where replies are sampled, the contestants try each task several times;
    the other cells once, so that all cells together cost no more episodes than greedy play does."""
    context, environment = comparison.context, comparison.environment
    is_repeated = is_contestant and context.is_sampled(environment)
    num_tries = context.config.evaluation.num_tries if is_repeated else 1
    return await comparison.play(cell, tasks, environment, num_tries=num_tries)


async def _decide(
    comparison: Comparison, cells: dict[str, CellResult], contestants: list[CellResult]
) -> dict[str, Any]:
    """Judge (candidate, incumbent, candidate without memory if it was played), and act on the verdict."""
    context = comparison.context
    ours, theirs, *lean = contestants
    without_memory = next((result for result in lean if not result.cell.use_memory), None)
    # a comparison that was closed without a test has no look; it is only repeated after a crash
    look = comparison.entry.look or 1
    verdict = judge(ours, theirs, context.config.evaluation, look=look, without_memory=without_memory)
    active = context.memory.policies.active().version
    if active not in (verdict.incumbent.policy, verdict.candidate.policy):
        reason = f"policy v{active} became active meanwhile; the candidate was measured against "
        reason += f"v{verdict.incumbent.policy}"
        verdict = replace(verdict, decision=Decision.UNINFORMATIVE, reason=reason, was_tested=False)
    if verdict.decision is Decision.PROMOTE:
        verdict = await _play_regressions(comparison, verdict)
    if verdict.decision is Decision.PROMOTE and comparison.environment:
        await _play_sealed(comparison, verdict.candidate)
    if verdict.decision is Decision.UNINFORMATIVE:
        verdict = replace(verdict, reason=f"{verdict.reason}; {_how_to_go_on(comparison, verdict)}")
    return await _conclude(comparison, cells, verdict)


def _how_to_go_on(comparison: Comparison, verdict: Verdict) -> str:
    ours, theirs = f"v{verdict.candidate.policy}", f"v{verdict.incumbent.policy}"
    if comparison.environment:
        return f"`judge {ours}` plays {'new' if verdict.was_tested else 'other'} held-out tasks and decides again"
    new = "other held-out tasks than before" if verdict.was_tested else "the same held-out tasks"
    return f"have {ours} and {theirs} play {new} alike, reward all of them, and judge again"


async def _play_regressions(comparison: Comparison, verdict: Verdict) -> Verdict:
    """Have both play held-out tasks of every other environment that was learned from: none may have become worse."""
    context, wanted = comparison.context, comparison.context.config.evaluation
    for environment in context.config.learn_from:
        tasks = context.take_held_out(environment, max(0, comparison.held_out_offset))
        await comparison.prepare(tasks)
        sides = []
        for name, cell in (("candidate", verdict.candidate), ("incumbent", verdict.incumbent)):
            side = replace(cell, name=f"{environment}-{name}")
            sides.append(await comparison.play(side, tasks, environment, num_tries=1))
        paired = compare_pairs(pair_tasks(*sides))
        comparison.regressions.append({"environment": environment, **vars(paired)})
        if paired.low > -wanted.max_regression:
            continue
        is_worse = paired.high < 0
        decision = Decision.REJECT if is_worse else Decision.UNINFORMATIVE
        reason = (
            f"{'worse' if is_worse else 'not shown to be as good'} on {paired.num_tasks} held-out tasks of "
            f"{environment!r}, which it learned from too: {paired.difference:+.1%} (95 % interval {paired.low:+.1%} to "
            f"{paired.high:+.1%}, limit {-wanted.max_regression:.1%}); otherwise {verdict.reason}"
        )
        return replace(verdict, decision=decision, reason=reason)
    return verdict


async def _play_sealed(comparison: Comparison, cell: Cell) -> None:
    """Play the sealed block once, as the promoted policy will serve; after the decision, which it does not change."""
    context = comparison.context
    tasks = context.seams.sealed_tasks(comparison.environment, context.config.evaluation.num_sealed_tasks)
    await comparison.prepare(tasks)
    if tasks:
        sealed = replace(cell, name="sealed")
        comparison.sealed = await comparison.play(sealed, tasks, comparison.environment, num_tries=1)


async def _conclude(comparison: Comparison, cells: dict[str, CellResult], verdict: Verdict) -> dict[str, Any]:
    """Write the report, close the entry, then move the candidate to where the verdict sends it."""
    context, policies, entry = comparison.context, comparison.context.memory.policies, comparison.entry
    gate = await asyncio.to_thread(_describe_gate, comparison, verdict)
    report = await asyncio.to_thread(
        write_report, context, cells, verdict, gate, keep_earlier=not comparison.is_in_cycle
    )
    sealed = comparison.sealed
    await context.memory.verdicts.close(
        entry.id,
        verdict.decision.value,
        was_tested=verdict.was_tested,
        tasks=verdict.tasks,
        sealed=(sealed.num_successes, len(sealed.played)) if sealed is not None else (0, 0),
    )
    summary = {**verdict.to_json(), "policy": verdict.candidate.policy, "report": str(report)}
    here = policies.get(verdict.candidate.policy)
    stage = _stage_after(verdict, here)
    if here.stage is stage:
        await policies.note_verdict(here.version, summary)
    else:
        await policies.move(here.version, stage, verdict=summary, use_memory=_serves_as(comparison, verdict))
    return summary


def _stage_after(verdict: Verdict, here: Policy) -> PolicyStage:
    if verdict.decision is Decision.PROMOTE:
        return PolicyStage.ACTIVE
    if verdict.decision is Decision.REJECT:
        return PolicyStage.REJECTED
    return PolicyStage.CANDIDATE if verdict.was_tested else here.stage


def _serves_as(comparison: Comparison, verdict: Verdict) -> bool | None:
    """Return whether the promoted policy serves with memory, where that is not the server's setting anyway: it serves
    as it was proved."""
    if verdict.decision is not Decision.PROMOTE:
        return None
    proved = verdict.candidate.use_memory
    if not comparison.environment:  # clients' tries without memory may only have found none
        return False if verdict.basis is Basis.NO_WORSE else None
    return None if proved == comparison.context.seams.serving(comparison.environment).use_memory else proved


def _describe_gate(comparison: Comparison, verdict: Verdict) -> dict[str, Any]:
    """Return what the report says of the gate itself."""
    context, entry, verdicts = comparison.context, comparison.entry, comparison.context.memory.verdicts
    environment, wanted = comparison.environment, comparison.context.config.evaluation
    spent = verdicts.alpha_spent(entry.incumbent) - (0.0 if verdict.was_tested else entry.alpha)
    sealed, before = comparison.sealed, verdicts.num_sealed(environment)
    played = {}
    if environment:
        played = {
            "temperature": context.gate_serving(environment).temperature,
            "serving_temperature": context.seams.serving(environment).temperature,
            "num_tries": wanted.num_tries if context.is_sampled(environment) else 1,
            "held_out_offset": comparison.held_out_offset,
        }
    return {
        **played,
        "look": entry.look if verdict.was_tested else None,
        "alpha": entry.alpha if verdict.was_tested else 0.0,
        "alpha_spent": spent,
        "alpha_budget": wanted.false_promotion_rate,
        "regressions": comparison.regressions,
        "sealed": None if sealed is None else sealed.summary(),
        "sealed_touches": before + (sealed is not None and entry.decision is None),
    }


def choose_cells(context: CycleContext) -> list[Cell]:
    """Return what is played: {base, SFT, candidate} x {memory on, off}, and the incumbent as it serves."""
    artifacts = context.artifacts
    sft, candidate, incumbent = artifacts["sft"]["policy"], artifacts["candidate"], artifacts["incumbent"]
    policies = {"base": 0, "sft": sft} | ({} if candidate == sft else {"dpo": candidate})
    cells = [
        Cell(f"{name}-{'on' if use_memory else 'off'}", policy, use_memory)
        for name, policy in policies.items()
        for use_memory in (False, True)
    ]
    if incumbent != 0:
        cells.append(choose_contestants(context)[1])
    return cells


def choose_contestants(context: CycleContext) -> list[Cell]:
    """Return (candidate as it would serve, incumbent as it serves, candidate without memory if that may win)."""
    artifacts = context.artifacts
    candidate = "sft" if artifacts["candidate"] == artifacts["sft"]["policy"] else "dpo"
    incumbent = artifacts["incumbent"]
    return _contest(context, candidate, "base" if incumbent == 0 else "incumbent", incumbent)


def _contest(context: CycleContext, ours: str, theirs: str, incumbent: int) -> list[Cell]:
    environment, candidate = context.config.environment, context.artifacts["candidate"]
    use_memory = context.gate_serving(environment).use_memory
    serves_as = context.memory.policies.get(incumbent).use_memory
    if serves_as is None:
        serves_as = context.seams.serving(environment).use_memory
    cells = [
        Cell(f"{ours}-{'on' if use_memory else 'off'}", candidate, use_memory),
        Cell(f"{theirs}-{'on' if serves_as else 'off'}", incumbent, serves_as),
    ]
    if context.config.evaluation.noninferiority_margin is not None:
        cells.append(Cell(f"{ours}-off", candidate, False))
    return cells


def _write_cell(path: Path, result: CellResult) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps([vars(episode) for episode in result.played]), encoding="utf-8")
    unfinished.replace(path)


def _read_cell(path: Path, cell: Cell) -> CellResult:
    played = json.loads(path.read_text(encoding="utf-8"))
    return CellResult(cell, [EpisodeSummary(**episode) for episode in played])
