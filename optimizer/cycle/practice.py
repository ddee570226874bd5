"""Plays practice tasks to learn from: rounds of the incumbent with insights in between, and rounds of a new policy.

Flow: `practice` (the incumbent, insights after each round), later `explore` (a policy of this cycle, without memory).
Invariant: a finished round is not played again when the stage is repeated, nor the finished episodes of another.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

import structlog

from memory.schema import Task
from memory.scopes import EVERYBODY
from optimizer.config import RoundsConfig
from optimizer.cycle.artifacts import Critiques
from optimizer.cycle.context import CycleContext
from optimizer.data.needs import MeasureNeed, require_reachable
from optimizer.errors import CompletionError
from optimizer.insights.extraction import Extraction, extract_insights
from optimizer.rewards import split

log = structlog.get_logger()


async def practice(context: CycleContext, measure_need: MeasureNeed) -> None:
    """Play rounds of practice with the incumbent; extract insights from each before the next one begins.

    Raises:
        TooFewTrajectories: the remaining rounds cannot bring as many rows as `measure_need` asks for.
    """
    config = context.config
    rounds = config.practice_rounds
    if not rounds:
        await learn_insights(context)
        return
    tasks = context.practice_tasks()
    await context.prepare(tasks)
    # once for all rounds: a promotion in the meantime does not change the policy that practises
    incumbent = context.memory.policies.active().version
    for number in range(context.artifacts.num_practice_rounds, len(rounds)):
        uses_memory = config.practice_memory[min(number, len(config.practice_memory) - 1)]
        await context.play(
            tasks[: rounds[number]],
            policy=incumbent,
            use_memory=uses_memory,
            temperature=config.practice_temperature,
            label=f"practice round {number + 1} of {len(rounds)}",
        )
        await learn_insights(context)
        # after the insights: a round without its insights is played again
        await context.save_artifacts(num_practice_rounds=number + 1)
        # not after the last round: then the rows are built and counted exactly
        if rounds_left := rounds[number + 1 :]:
            await asyncio.to_thread(require_reachable, context.memory, config, measure_need, rounds_left)


async def learn_insights(context: CycleContext) -> None:
    """Bring the insights up to date with all episodes so far.

    Each insight is drawn from the episodes of a single scope: the practice of a tenant together with the episodes its
    clients share, or the episodes of one person. Episodes without a scope yield no insights. Untrusted episodes are not
    read, and untrusted insights are not built on, until an operator approves them.
    """
    memory, by_scope = context.memory, defaultdict(list)
    pool = await context.read_pool(any_environment=True, is_for_weights=False)
    for each in pool:
        scope = memory.scopes.of_trajectory(each.trajectory)
        if scope is not None and each.trajectory.may_teach:
            by_scope[each.trajectory.tenant, scope].append(each)
    # ids sort by time, so that one bound serves both queries
    since_id = min((each.trajectory.id for each in pool), default="")
    already_read = await asyncio.to_thread(memory.insights.read_evidence, since_id=since_id)
    comments = await asyncio.to_thread(memory.feedback.comments, since_id=since_id)
    context_tokens = await _measure_context(context)
    for tenant, scope in sorted({*by_scope, ("", EVERYBODY)}):
        successes, failures = split(by_scope[tenant, scope])
        known = memory.insights.active(tenant=tenant, user_id=scope, scope=scope)
        extraction = await extract_insights(
            successes,
            failures,
            known=[insight for insight in known if insight.is_trusted],
            complete=context.seams.complete,
            context_tokens=context_tokens,
            comments=comments,
            already_read=already_read,
            seed=context.config.seed,
        )
        # With `share_live = "tenant"` the scope holds episodes of persons, too: should the setting become "user" again,
        # an insight drawn from them must be shown to nobody, so it is not marked as shared.
        is_shared = not memory.scopes.shares_live and scope == EVERYBODY
        operations = [
            replace(operation, tenant=tenant, user_id=scope, is_shared=is_shared) for operation in extraction.operations
        ]
        await memory.insights.apply(operations, evidence=extraction.evidence)
        await _count_critiques(context, extraction)


async def _measure_context(context: CycleContext) -> int | None:
    """Return the critic's context length in tokens; None where it is unknown, also because the critic does not answer.
    Its calls will then fail as well, and be counted."""
    if context.seams.complete is None:
        return None
    try:
        return await context.seams.context_tokens()
    except CompletionError as error:
        log.warning("the critic's context is unknown", reason=str(error))
        return None


async def _count_critiques(context: CycleContext, extraction: Extraction) -> None:
    """Add the calls of one extraction to those of the whole cycle."""
    if not extraction.num_asked:
        return
    before = context.artifacts.critiques or Critiques()
    critiques = Critiques(
        num_asked=before.num_asked + extraction.num_asked,
        num_failed=before.num_failed + extraction.num_failed,
        num_skipped=before.num_skipped + extraction.num_skipped,
        first_failure=before.first_failure or extraction.first_failure,
    )
    await context.save_artifacts(critiques=critiques)


async def explore(context: CycleContext, policy: int) -> None:
    """Let a policy of this cycle play the practice tasks without memory, so that preferences come from its own mistakes
    (ETO, arXiv 2403.02502).

    The first half of the episodes is spread evenly over all tasks, the second half goes to the tasks whose outcome
    varies: only a task that was both won and lost gives a preference. Departure from ETO, which samples every task
    alike.
    """
    config = context.config
    rounds = config.explore_rounds
    if not rounds:
        return
    tasks = context.practice_tasks()
    await context.prepare(tasks)
    for number in range(context.artifacts.num_explore_rounds, len(rounds)):
        label = f"exploration round {number + 1} of {len(rounds)}"
        chosen = tasks[: rounds[number]]
        # outcomes of the first half decide where the second half goes
        if number >= len(rounds) / 2:
            # without those of this very round, or a repeated stage would choose other tasks
            outcomes = await _outcomes(context, before=context.artifacts.rounds_begun.get(label))
            chosen = choose_tasks_to_retry(tasks, outcomes, rounds[number])
        await context.play(
            chosen,
            policy=policy,
            use_memory=False,
            temperature=config.practice_temperature,
            label=label,
        )
        await context.save_artifacts(num_explore_rounds=number + 1)


async def play_round(
    context: CycleContext, policy: int, config: RoundsConfig, *, with_memory: bool, label: str
) -> None:
    """Let a policy try each of the first practice tasks several times without memory, and `with_memory` as often with
    it; at temperature 1, where its log-probs are those that its tokens were sampled with. These are kept."""
    tasks = context.practice_tasks()[: config.num_tasks]
    await context.prepare(tasks)
    for use_memory in (False, True) if with_memory else (False,):
        await context.play(
            tasks * config.num_tries,
            policy=policy,
            use_memory=use_memory,
            temperature=1.0,
            label=f"{label}, with memory" if use_memory else label,
            keeps_logprobs=True,
        )


async def _outcomes(context: CycleContext, *, before: datetime | None) -> dict[str, list[bool]]:
    outcomes: dict[str, list[bool]] = defaultdict(list)
    for each in await context.read_pool(this_cycle_only=True):
        if before is None or each.trajectory.opened_at <= before:
            outcomes[each.trajectory.task or ""].append(each.is_success)
    return outcomes


def choose_tasks_to_retry(tasks: Sequence[Task], outcomes: dict[str, list[bool]], num_tries: int) -> list[Task]:
    """Return `num_tries` tasks, some of them repeatedly, those whose outcome is least certain first.

    The certainty of an outcome is how far the smoothed share of wins lies from one half; the tasks of the less certain
    half are played one after the other.
    """

    def certainty(task: Task) -> float:
        tries = outcomes.get(task.name, [])
        # smoothed: a task that was never tried has the certainty 0 and comes first
        return abs((sum(tries) + 0.5) / (len(tries) + 1) - 0.5)

    uncertain = sorted(tasks, key=lambda task: (certainty(task), task.name))[: max(1, len(tasks) // 2)]
    return [uncertain[number % len(uncertain)] for number in range(num_tries)]
