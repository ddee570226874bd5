"""Plays practice tasks to learn from: rounds with lessons in between, and tries where they can still teach.

Refuses to train. Flow: `practice` (rounds of the incumbent, insights after each), later `explore` (rounds of the SFT
policy).
Invariant: a round that was finished is not played again when the stage is repeated.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import structlog

from memory.schema import Task
from memory.scopes import EVERYBODY
from optimizer.cycle.context import CycleContext
from optimizer.cycle.practice_plan import plan_rounds
from optimizer.cycle.readiness import require_reachable
from optimizer.errors import CompletionError
from optimizer.insights.extraction import Extraction, extract_insights
from optimizer.rewards import split

log = structlog.get_logger()


async def practice(context: CycleContext) -> None:
    """Play rounds of practice with the incumbent; put what each taught into words before the next one begins.

    Raises:
        TooFewTrajectories: the rounds that are left cannot bring enough demonstrations.
    """
    config = context.config
    rounds = plan_rounds(config.practice_episodes, config.num_practice_tasks)
    if not rounds:
        await learn_words(context)
        return
    tasks = context.practice_tasks()
    await context.prepare(tasks)
    incumbent = context.memory.policies.active().version
    for number in range(context.artifacts.get("num_practice_rounds", 0), len(rounds)):
        uses_memory = config.practice_memory[min(number, len(config.practice_memory) - 1)]
        await context.play(
            tasks[: rounds[number]],
            policy=incumbent,
            use_memory=uses_memory,
            temperature=config.practice_temperature,
            label=f"practice round {number + 1} of {len(rounds)}",
        )
        await learn_words(context)
        await context.keep(num_practice_rounds=number + 1)
        if rounds_left := rounds[number + 1 :]:
            await asyncio.to_thread(require_reachable, context.memory, config, rounds_left)


async def learn_words(context: CycleContext) -> None:
    """Bring the insights up to date with everything that was lived so far. Each is drawn from the episodes of one scope
    alone: a tenant's practice and what its clients share, or one person's. What is nobody's teaches no words. Untrusted
    episodes are not read, and untrusted insights not built on, until an operator approves them."""
    memory, by_scope = context.memory, defaultdict(list)
    pool = await context.read_pool(any_environment=True, is_for_weights=False)
    for each in pool:
        scope = memory.scopes.of_trajectory(each.trajectory)
        if scope is not None and each.trajectory.may_teach:
            by_scope[each.trajectory.tenant, scope].append(each)
    since_id = min((each.trajectory.id for each in pool), default="")
    already_read = await asyncio.to_thread(memory.insights.read_evidence, since_id=since_id)
    comments = await asyncio.to_thread(memory.feedback.comments, since_id=since_id)
    context_tokens = await _measure_context(context)
    for tenant, scope in sorted({*by_scope, ("", EVERYBODY)}):
        successes, failures = split(by_scope[tenant, scope])
        known = memory.insights.active(tenant=tenant, user_id=scope, scope=scope)
        found = await extract_insights(
            successes,
            failures,
            known=[insight for insight in known if insight.is_trusted],
            complete=context.seams.complete,
            context_tokens=context_tokens,
            comments=comments,
            already_read=already_read,
            seed=context.config.seed,
        )
        # With `share_live = "tenant"` these are episodes of persons, too: under "user" again, it is shown to nobody.
        whose = {"tenant": tenant, "user_id": scope, "is_shared": not memory.scopes.shares_live and scope == EVERYBODY}
        operations = [replace(operation, **whose) for operation in found.operations]
        await memory.insights.apply(operations, evidence=found.evidence)
        await _count_critiques(context, found)


async def _measure_context(context: CycleContext) -> int | None:
    """Return what the critic can hold; None where it does not say, or does not answer: then asking it fails, too."""
    if context.seams.complete is None:
        return None
    try:
        return await context.seams.context_tokens()
    except CompletionError as error:
        log.warning("the critic's context is unknown", reason=str(error))
        return None


async def _count_critiques(context: CycleContext, found: Extraction) -> None:
    """Add to what the cycle's report says of its critic."""
    if not found.num_asked:
        return
    before = context.artifacts.get("critiques", {})
    counts = {name: before.get(name, 0) + getattr(found, name) for name in ("num_asked", "num_failed", "num_skipped")}
    await context.keep(critiques={**counts, "first_failure": before.get("first_failure") or found.first_failure})


async def explore(context: CycleContext, policy: int) -> None:
    """Let the SFT policy play the practice tasks without memory, so that its own mistakes can be weighed (ETO).

    The first half of the episodes goes to all tasks alike. The second goes where tries differ: a task that was won
    once and lost once gives a preference, one that is always won or always lost gives none. Departure from ETO,
    which samples every task alike.
    """
    config = context.config
    rounds = plan_rounds(config.explore_episodes, config.num_practice_tasks)
    if not rounds:
        return
    tasks = context.practice_tasks()
    await context.prepare(tasks)
    for number in range(context.artifacts.get("num_explore_rounds", 0), len(rounds)):
        chosen = tasks[: rounds[number]]
        if number >= len(rounds) / 2:
            chosen = choose_tasks_to_retry(tasks, await _outcomes(context), rounds[number])
        await context.play(
            chosen,
            policy=policy,
            use_memory=False,
            temperature=config.practice_temperature,
            label=f"exploration round {number + 1} of {len(rounds)}",
        )
        await context.keep(num_explore_rounds=number + 1)


async def _outcomes(context: CycleContext) -> dict[str, list[bool]]:
    outcomes: dict[str, list[bool]] = defaultdict(list)
    for each in await context.read_pool(this_cycle_only=True):
        outcomes[each.trajectory.task or ""].append(each.is_success)
    return outcomes


def choose_tasks_to_retry(tasks: Sequence[Task], outcomes: dict[str, list[bool]], num_tries: int) -> list[Task]:
    """Return `num_tries` tasks, some of them repeatedly, those whose outcome is least certain first.

    The certainty of an outcome is how far the smoothed share of wins lies from one half; the tasks of the less certain
    half are played in turn.
    """

    def certainty(task: Task) -> float:
        tries = outcomes.get(task.name, [])
        return abs((sum(tries) + 0.5) / (len(tries) + 1) - 0.5)

    open_questions = sorted(tasks, key=lambda task: (certainty(task), task.name))[: max(1, len(tasks) // 2)]
    return [open_questions[number % len(open_questions)] for number in range(num_tries)]
