"""The release gate of a cycle: plays the held-out tasks, writes the report, and moves the candidate to its stage.

The decision itself is made in `optimizer.evaluation.decision`.
Invariants: every comparison is entered in the ledger (`memory.records.verdicts`) before its outcome is known; each
comparison plays held-out tasks of its own; the sealed block is played once, by a policy that was promoted, and decides
nothing.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path

from memory.schema import Policy, PolicyStage, StoredVerdict, Task, new_id
from optimizer.cycle.artifacts import DecidedVerdict, to_json
from optimizer.cycle.context import CycleContext
from optimizer.cycle.methods import CONTROL, list_methods
from optimizer.cycle.report import Evaluation, GateFigures, PlayFigures, Regression, build_report
from optimizer.cycle.report_page import write_report
from optimizer.cycle.stages import nominate
from optimizer.evaluation import decision
from optimizer.evaluation.cells import Cell, CellResult, compare_pairs, pair_tasks, play_cell, read_cell, write_cell
from optimizer.evaluation.comparisons import PlayedPolicy
from optimizer.evaluation.decision import Basis, Decision, Verdict, alpha_of
from optimizer.evaluation.logged import read_logged_cells


@dataclass
class Comparison:
    """One comparison of a candidate with the active policy, while it is being made."""

    context: CycleContext
    entry: StoredVerdict
    """Its row in the ledger."""
    is_in_cycle: bool
    """False: the cycle has closed, and its row takes no more progress."""
    regressions: list[Regression] = field(default_factory=list)
    sealed: CellResult | None = None

    @property
    def environment(self) -> str:
        return self.context.config.environment

    @property
    def held_out_offset(self) -> int:
        return self.entry.held_out_end - self.context.num_gate_tasks(self.environment)

    async def play(self, cell: Cell, tasks: list[Task], environment: str, *, num_tries: int) -> CellResult:
        """Play a cell, or read its episodes if they were played before a crash."""
        context, is_in_cycle = self.context, self.is_in_cycle
        # the file is looked up by the cell's name alone: within one comparison a name must mean one policy, with or
        # without memory, and one number of tries
        path = context.directory / f"cell-{'' if is_in_cycle else self.entry.id + '-'}{cell.name}.json"
        if not path.exists():
            trajectories = context.memory.trajectories
            played = await play_cell(
                cell,
                tasks,
                rollout=context.seams.rollout,
                grade=trajectories.reward_for_weights,
                count_model_calls=trajectories.count_model_calls,
                success_reward=trajectories.success_reward,
                concurrency=context.config.concurrency,
                temperature=context.gate_serving(environment).temperature,
                num_tries=num_tries,
                seed=context.config.seed,
                on_progress=context.report_progress if is_in_cycle else None,
            )
            write_cell(path, played)
        return read_cell(path, cell)

    async def prepare(self, tasks: list[Task]) -> None:
        """Make tasks ready to start."""
        if self.is_in_cycle:
            await self.context.prepare(tasks)
        elif tasks:
            await self.context.seams.prepare(tasks)


async def evaluate(context: CycleContext) -> dict[str, CellResult]:
    """Nominate the candidate and play every cell on the same held-out tasks; return the results by cell.

    A cell that was played is not played again. Where only clients can play, nothing is played and no cell returned.
    """
    # order: candidate, incumbent, ledger, tasks; each is saved before the next is derived from it, so a repeated stage
    # plays the same comparison
    await nominate(context)
    if not context.config.environment:
        return {}
    if context.artifacts.incumbent is None:
        await context.save_artifacts(incumbent=context.memory.policies.active().version)
    comparison = await _enter_cycle_comparison(context)
    await context.save_artifacts(held_out_offset=comparison.held_out_offset, look=comparison.entry.look)
    tasks = context.held_out_tasks()
    await comparison.prepare(tasks)
    # a contestant may also be one of the other cells: it is played once, with all its tries
    contestants = {cell.name for cell in list_contestants(context)}
    return {
        cell.name: await _play(comparison, cell, tasks, is_contestant=cell.name in contestants)
        for cell in list_cells(context)
    }


async def decide(context: CycleContext) -> DecidedVerdict:
    """Decide by the cells, write the report, and move the candidate; return the verdict.

    Order: the report exists before the policies are swapped.
    """
    if context.config.environment:
        comparison = await _enter_cycle_comparison(context)
        tasks = context.held_out_tasks()
        # read from disk, where `evaluate` left them; the number of tries would matter only for a file that has been
        # deleted
        cells = {cell.name: await _play(comparison, cell, tasks, is_contestant=True) for cell in list_cells(context)}
        contestants = [cells[cell.name] for cell in list_contestants(context)]
        decided = await _conclude(comparison, cells, contestants, list_policies(context))
    else:
        decided = await _decide_by_log(context, _cycle_entry(context), is_in_cycle=True)
    # checkpoints, specs and logs; adapters lie under `adapters`, and the cells and rows stay
    shutil.rmtree(context.directory / "training", ignore_errors=True)
    await context.save_artifacts(verdict=decided)
    return decided


async def decide_again(context: CycleContext) -> DecidedVerdict:
    """Compare a closed cycle's candidate with the active policy, on tasks that have not decided about it yet.

    New held-out tasks are played where the cycle played; otherwise the episodes that clients played are compared.

    Raises:
        OptimizerError: the cycle has a method of learning that this version has not.
    """
    # the report needs them: a cycle of another version is refused before anything is played
    list_methods(context.artifacts.methods)
    entry_id = new_id("ver")
    if not context.config.environment:
        return await _decide_by_log(context, entry_id, is_in_cycle=False)
    # with the policy active now, not the cycle's incumbent: only now can it be replaced
    comparison = await _enter(context, entry_id, context.memory.policies.active().version, is_in_cycle=False)
    # a list of tasks that has an end begins again, with tasks that have decided
    used = context.memory.verdicts.tasks_used(comparison.entry.candidate)
    tasks = [
        task
        for task in context.take_held_out(comparison.environment, comparison.held_out_offset)
        if task.name not in used
    ]
    await comparison.prepare(tasks)
    contestants = _pair_contestants(context, "candidate", "incumbent", comparison.entry.incumbent)
    played = [await _play(comparison, cell, tasks, is_contestant=True) for cell in contestants]
    return await _conclude(comparison, {result.cell.name: result for result in played}, played, [])


async def _decide_by_log(context: CycleContext, entry_id: str, *, is_in_cycle: bool) -> DecidedVerdict:
    """Decide by the episodes that clients played with the candidate and with the active policy."""
    policies = context.memory.policies
    candidate, incumbent = policies.get(context.artifacts.candidate_version), policies.active()
    comparison = await _enter(context, entry_id, incumbent.version, is_in_cycle=is_in_cycle)
    cells = await asyncio.to_thread(read_logged_cells, context.memory, candidate, incumbent)
    # the candidate's twice: where its tries were without memory it is also the cell that may be no worse and cheaper
    return await _conclude(comparison, {cell.cell.name: cell for cell in cells}, [*cells, cells[0]], [])


def _cycle_entry(context: CycleContext) -> str:
    # always the same, so that a stage that is repeated after a crash spends nothing twice
    return f"ver_{context.cycle_id}"


async def _enter_cycle_comparison(context: CycleContext) -> Comparison:
    """Enter the comparison that belongs to the cycle itself, or find it entered."""
    incumbent = context.artifacts.incumbent
    assert incumbent is not None, "the incumbent is saved when the first stage of the gate begins"
    return await _enter(context, _cycle_entry(context), incumbent, is_in_cycle=True)


async def _enter(context: CycleContext, entry_id: str, incumbent: int, *, is_in_cycle: bool) -> Comparison:
    """Enter a comparison in the ledger: its look at the incumbent, and its own block of held-out tasks."""
    environment, verdicts = context.config.environment, context.memory.verdicts
    # read before the transaction that enters the row: two comparisons that interleave here would share a block. Learner
    # keeps them apart (`_deciding`, and no `judge` while a cycle is open)
    start = verdicts.held_out_end(environment)
    entry = StoredVerdict(
        id=entry_id,
        candidate=context.artifacts.candidate_version,
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


async def _conclude(
    comparison: Comparison,
    cells: Mapping[str, CellResult],
    contestants: list[CellResult],
    policies: list[PlayedPolicy],
) -> DecidedVerdict:
    """Decide between (candidate, incumbent, candidate without memory if it was played), and act on the verdict."""
    context = comparison.context
    # positional: list_contestants returns them in this order
    candidate, incumbent, *others = contestants
    without_memory = next((result for result in others if not result.cell.use_memory), None)
    # a comparison that was closed without a test has no look; it is only repeated after a crash
    look = comparison.entry.look or 1
    verdict = decision.decide(
        candidate,
        incumbent,
        context.config.evaluation,
        look=look,
        without_memory=without_memory,
        is_open_ended=not comparison.environment,
    )
    active = context.memory.policies.active().version
    # the candidate itself is active when the stage is repeated after a crash
    if active not in (verdict.incumbent.policy, verdict.candidate.policy):
        reason = f"policy v{active} became active meanwhile; the candidate was measured against "
        reason += f"v{verdict.incumbent.policy}"
        verdict = replace(verdict, decision=Decision.UNINFORMATIVE, reason=reason, was_tested=False)
    if verdict.decision is Decision.PROMOTE:
        # order: other environments may still veto, the sealed block decides nothing and comes last
        verdict = await _play_regressions(comparison, verdict)
    if verdict.decision is Decision.PROMOTE and comparison.environment:
        await _play_sealed(comparison, verdict.candidate)
    if verdict.decision is Decision.UNINFORMATIVE:
        verdict = replace(verdict, reason=f"{verdict.reason}; {_suggest_next_step(comparison, verdict)}")
    return await _act_on(comparison, verdict, cells, policies)


def _suggest_next_step(comparison: Comparison, verdict: Verdict) -> str:
    candidate, incumbent = f"v{verdict.candidate.policy}", f"v{verdict.incumbent.policy}"
    if comparison.environment:
        return f"`judge {candidate}` plays {'new' if verdict.was_tested else 'other'} held-out tasks and decides again"
    new = "other held-out tasks than before" if verdict.was_tested else "the same held-out tasks"
    return f"have {candidate} and {incumbent} play {new} alike, reward all of them, and judge again"


async def _play_regressions(comparison: Comparison, verdict: Verdict) -> Verdict:
    """Have both play held-out tasks of every other environment that was learned from: none may have become worse."""
    context, wanted = comparison.context, comparison.context.config.evaluation
    for environment in context.config.learn_from:
        # an environment of `learn_from` has no ledger of its own: its block follows that of the main one. max: a
        # comparison by the log has no block, and its offset is negative
        tasks = context.take_held_out(environment, max(0, comparison.held_out_offset))
        await comparison.prepare(tasks)
        sides = []
        for name, cell in (("candidate", verdict.candidate), ("incumbent", verdict.incumbent)):
            side = replace(cell, name=f"{environment}-{name}")
            sides.append(await comparison.play(side, tasks, environment, num_tries=1))
        paired = compare_pairs(pair_tasks(*sides))
        comparison.regressions.append(Regression(**vars(paired), environment=environment))
        if paired.low > -wanted.max_regression:
            continue
        # only evidence rejects; an interval that reaches below the limit because it is wide decides nothing
        is_worse = paired.high < 0
        outcome = Decision.REJECT if is_worse else Decision.UNINFORMATIVE
        reason = (
            f"{'worse' if is_worse else 'not shown to be as good'} on {paired.num_tasks} held-out tasks of "
            f"{environment!r}, which it learned from too: {paired.difference:+.1%} (95 % interval {paired.low:+.1%} to "
            f"{paired.high:+.1%}, limit {-wanted.max_regression:.1%}); otherwise {verdict.reason}"
        )
        return replace(verdict, decision=outcome, reason=reason)
    return verdict


async def _play_sealed(comparison: Comparison, cell: Cell) -> None:
    """Play the sealed block once, as the promoted policy will serve; after the decision, which it does not change."""
    context = comparison.context
    tasks = context.seams.sealed_tasks(comparison.environment, context.config.evaluation.num_sealed_tasks)
    await comparison.prepare(tasks)
    if tasks:
        sealed = replace(cell, name="sealed")
        comparison.sealed = await comparison.play(sealed, tasks, comparison.environment, num_tries=1)


async def _act_on(
    comparison: Comparison, verdict: Verdict, cells: Mapping[str, CellResult], played: list[PlayedPolicy]
) -> DecidedVerdict:
    """Write the report, close the entry, then move the candidate to the stage that the verdict leads to."""
    context, policies, entry = comparison.context, comparison.context.memory.policies, comparison.entry
    gate = await asyncio.to_thread(_describe_gate, comparison, verdict)
    control = find_control(context) if played else None
    methods = list_methods(context.artifacts.methods) + ([CONTROL] if control is not None else [])
    evaluation = Evaluation(cells, played, methods, verdict, gate, control)
    # order: report, ledger, policy. A crash after any of them repeats the stage with the cells on disk
    page = await asyncio.to_thread(_write_report, context, evaluation, keep_earlier=not comparison.is_in_cycle)
    sealed = comparison.sealed
    await context.memory.verdicts.close(
        entry.id,
        verdict.decision.value,
        was_tested=verdict.was_tested,
        tasks=verdict.tasks,
        sealed=(sealed.num_successes, len(sealed.played)) if sealed is not None else (0, 0),
    )
    # the ledger is closed before the policy moves: a crash in between repeats the stage, and spends nothing again
    figures = {**verdict.to_json(), "policy": verdict.candidate.policy, "report": str(page)}
    decided = DecidedVerdict.model_validate(figures)
    stored = to_json(decided)
    candidate = policies.get(verdict.candidate.policy)
    stage = _stage_after(verdict, candidate)
    if candidate.stage is stage:
        await policies.note_verdict(candidate.version, stored)
    else:
        await policies.move(candidate.version, stage, verdict=stored, use_memory=_serves_as(comparison, verdict))
    return decided


def _write_report(context: CycleContext, evaluation: Evaluation, *, keep_earlier: bool) -> Path:
    return write_report(context.reports, build_report(context, evaluation), evaluation, keep_earlier=keep_earlier)


def _stage_after(verdict: Verdict, candidate: Policy) -> PolicyStage:
    if verdict.decision is Decision.PROMOTE:
        return PolicyStage.ACTIVE
    if verdict.decision is Decision.REJECT:
        return PolicyStage.REJECTED
    return PolicyStage.CANDIDATE if verdict.was_tested else candidate.stage


def _serves_as(comparison: Comparison, verdict: Verdict) -> bool | None:
    """Return whether the promoted policy serves with memory, where that is not the server's setting anyway: it serves
    as it was proved."""
    if verdict.decision is not Decision.PROMOTE:
        return None
    # None follows the server's setting, which the operator may change later; True and False stay
    proved = verdict.candidate.use_memory
    if not comparison.environment:  # clients' tries without memory may only have found none
        return False if verdict.basis is Basis.NO_WORSE else None
    return None if proved == comparison.context.seams.serving(comparison.environment).use_memory else proved


def _describe_gate(comparison: Comparison, verdict: Verdict) -> GateFigures:
    """Return the figures of the gate itself, as the report stores them."""
    context, entry, verdicts = comparison.context, comparison.entry, comparison.context.memory.verdicts
    environment, wanted = comparison.environment, comparison.context.config.evaluation
    # the entry holds its alpha until it is closed, also where no test was made
    spent = verdicts.alpha_spent(entry.incumbent) - (0.0 if verdict.was_tested else entry.alpha)
    sealed, before = comparison.sealed, verdicts.num_sealed(environment)
    play = None
    if environment:
        play = PlayFigures(
            temperature=context.gate_serving(environment).temperature,
            serving_temperature=context.seams.serving(environment).temperature,
            num_tries=wanted.num_tries if context.is_sampled(environment) else 1,
            held_out_offset=comparison.held_out_offset,
        )
    return GateFigures(
        look=entry.look if verdict.was_tested else None,
        alpha=entry.alpha if verdict.was_tested else 0.0,
        alpha_spent=spent,
        alpha_budget=wanted.false_promotion_rate,
        regressions=comparison.regressions,
        sealed=None if sealed is None else sealed.summary(),
        # a repeated stage finds the entry closed and its touch counted already
        sealed_touches=before + (sealed is not None and entry.decision is None),
        play=play,
    )


def list_policies(context: CycleContext) -> list[PlayedPolicy]:
    """Return the policies whose cells are played: the base, and after each training the policy that the next one
    continued, which may be an adapter of an earlier epoch; after the last the candidate. A training whose adapters were
    not kept is left out."""
    artifacts = context.artifacts
    policies, title = [PlayedPolicy("base", "base", 0)], ""
    trained = [method for method in list_methods(artifacts.methods) if method.name in artifacts.trained]
    for method, after in zip_longest(trained, trained[1:]):
        if after is None:
            version = artifacts.candidate_version
        else:  # the reserved version is that of the first training, which continued what was kept before
            version = context.memory.policies.get(artifacts.versions[after.name]).parent or 0
        if version == policies[-1].version:
            continue
        title = f"{title}+{method.title}" if title else method.title
        policies.append(PlayedPolicy(method.name, title, version))
    return policies


def find_control(context: CycleContext) -> PlayedPolicy | None:
    """Return the control that this cycle trained."""
    trained = context.artifacts.trained.get(CONTROL.name)
    return None if trained is None else PlayedPolicy(CONTROL.name, CONTROL.title, trained.policy)


def list_cells(context: CycleContext) -> list[Cell]:
    """Return the cells to play: each policy and the control with memory off, and on where users are served with it; and
    the contestants."""
    control = find_control(context)
    uses = (False, True) if context.gate_serving(context.config.environment).use_memory else (False,)
    cells = [
        Cell(f"{policy.name}-{'on' if use_memory else 'off'}", policy.version, use_memory)
        for policy in [*list_policies(context), *([control] if control is not None else [])]
        for use_memory in uses
    ]
    return list(dict.fromkeys([*cells, *list_contestants(context)]))


def list_contestants(context: CycleContext) -> list[Cell]:
    """Return (candidate as it would serve, incumbent as it serves, candidate without memory if that may win)."""
    incumbent = context.artifacts.incumbent
    assert incumbent is not None, "the incumbent is saved before the first cell is played"
    candidate = list_policies(context)[-1].name
    return _pair_contestants(context, candidate, "base" if incumbent == 0 else "incumbent", incumbent)


def _pair_contestants(context: CycleContext, candidate_name: str, incumbent_name: str, incumbent: int) -> list[Cell]:
    environment, candidate = context.config.environment, context.artifacts.candidate_version
    use_memory = context.gate_serving(environment).use_memory
    # None on the policy's row: it follows the server's setting
    serves_with_memory = context.memory.policies.get(incumbent).use_memory
    if serves_with_memory is None:
        serves_with_memory = context.seams.serving(environment).use_memory
    cells = [
        Cell(f"{candidate_name}-{'on' if use_memory else 'off'}", candidate, use_memory),
        Cell(f"{incumbent_name}-{'on' if serves_with_memory else 'off'}", incumbent, serves_with_memory),
    ]
    if context.config.evaluation.noninferiority_margin is not None:
        cells.append(Cell(f"{candidate_name}-off", candidate, False))
    return cells
