"""Turns successes and failures into operations on insights: a model's critique, or counting where no model writes.

A critic is prompted as in ExpeL (arXiv 2308.10144); without one, `optimizer.insights.contrast` counts. Memory applies
the operations. A critic that fails costs its insights, never the cycle.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import structlog

from memory.records.insights import InsightOperation, OperationKind
from memory.schema import Insight
from optimizer.errors import CompletionError, PromptTooLong
from optimizer.insights.contrast import contrast_insights
from optimizer.insights.critique import MESSAGE_TOKENS, Critique, CritiqueInput, build_critique, choose_critique_inputs
from optimizer.insights.parsing import SCHEMA, InsightScope, parse_operations
from optimizer.rewards import GradedTrajectory
from optimizer.seams import Complete

log = structlog.get_logger()

DEFAULT_CONTEXT_TOKENS = 8192  # of an engine that does not say
MAX_ANSWER_TOKENS = 2048
CRITIQUE_SECONDS = 600.0
MAX_TRIES = 3  # of one critique, each with half the prompt: token counts are estimates
MAX_FAILURES_IN_A_ROW = 3  # then the critic counts as gone until the next round


@dataclass
class Extraction:
    """Operations extracted from episodes, the episodes that were read, and the calls that it took."""

    operations: list[InsightOperation] = field(default_factory=list)
    evidence: list[tuple[str, str]] = field(default_factory=list)
    """(trajectory id, kind of critique input) of every episode that was read."""
    num_asked: int = 0
    num_failed: int = 0
    num_skipped: int = 0
    """Readings that were not tried any more because the critic failed again and again."""
    first_failure: str | None = None

    def fail(self, reason: str) -> None:
        self.num_failed += 1
        self.first_failure = self.first_failure or reason
        log.warning("critique failed", reason=reason)


async def extract_insights(
    successes: Sequence[GradedTrajectory],
    failures: Sequence[GradedTrajectory],
    *,
    known: Sequence[Insight],
    complete: Complete | None = None,
    context_tokens: int | None = None,
    comments: Mapping[str, Sequence[str]] | None = None,
    already_read: Collection[tuple[str, str]] = frozenset(),
    max_critiques: int = 32,
    seed: int = 0,
) -> Extraction:
    """Return the operations that bring the insights `known` in line with the episodes.

    With `complete`, a model reads at most `max_critiques` groups of episodes that are not in `already_read`, with
    people's `comments` by trajectory id. Without it, counting decides.
    """
    if complete is None:
        operations = await asyncio.to_thread(contrast_insights, [*successes, *failures], known=known)
        return Extraction(operations)
    lists: dict[InsightScope, list[str]] = defaultdict(list)
    for insight in known:
        lists[(insight.environment, insight.kind)].append(insight.text)
    critique_inputs = choose_critique_inputs(
        successes, failures, already_read=already_read, max_critiques=max_critiques, seed=seed
    )
    critic = _Critic(complete, context_tokens or DEFAULT_CONTEXT_TOKENS, comments or {})
    extraction = Extraction()
    # a critic that is down must not delay the cycle by a timeout per critique
    num_failures_in_a_row = 0
    for critique_input in critique_inputs:
        if num_failures_in_a_row == MAX_FAILURES_IN_A_ROW:
            extraction.num_skipped += 1
            continue
        extraction.num_asked += 1
        try:
            answer, critique = await critic.ask(critique_input, lists[critique_input.scope])
        # other errors are defects, and end the cycle
        except (CompletionError, TimeoutError) as error:
            num_failures_in_a_row += 1
            extraction.fail(f"{type(error).__name__}: {str(error) or f'no answer in {CRITIQUE_SECONDS:g} seconds'}")
            continue
        num_failures_in_a_row = 0
        _take(extraction, answer, critique_input, critique, lists[critique_input.scope])
    return extraction


def _take(
    extraction: Extraction, answer: str, critique_input: CritiqueInput, critique: Critique, texts: list[str]
) -> None:
    """Add the operations of an answer. A useless answer counts as read, too: the same prompt would bring it again."""
    # only episodes that fitted into the prompt count as read; the others come again
    extraction.evidence += [(trajectory_id, critique_input.kind) for trajectory_id in critique.shown]
    operations = parse_operations(answer, critique_input.scope, texts)
    if operations is None:  # the answer stays out of logs and reports, because it may quote a person
        extraction.fail(f"no operation could be read out of the critic's answer of {len(answer)} characters")
        return
    extraction.operations += operations
    for operation in operations:
        _apply_to_list(texts, operation)


class _Critic:
    """A model that reads episodes, with the length of prompt that it accepts."""

    def __init__(self, complete: Complete, context_tokens: int, comments: Mapping[str, Sequence[str]]) -> None:
        self._complete = complete
        self._answer_tokens = min(MAX_ANSWER_TOKENS, context_tokens // 4)
        self._prompt_tokens = context_tokens - self._answer_tokens - MESSAGE_TOKENS
        self._comments = comments

    async def ask(self, critique_input: CritiqueInput, texts: Sequence[str]) -> tuple[str, Critique]:
        """Return the critic's answer, and the request that it answered.

        Raises:
            CompletionError: it gave none; TimeoutError: not in time.
        """
        budget = self._prompt_tokens
        for _ in range(MAX_TRIES):
            critique = build_critique(critique_input, texts, comments=self._comments, max_tokens=budget)
            if critique is None:
                raise PromptTooLong(
                    f"beside a list of {len(texts)} lessons no episode fits into {budget} tokens: give the critic a "
                    "longer context (engine.max_model_len, or critic.context_tokens of an endpoint)"
                )
            try:
                # not wait_for, which can swallow a cancellation in Python 3.11
                async with asyncio.timeout(CRITIQUE_SECONDS):
                    answer = await self._complete(critique.messages, schema=SCHEMA, max_tokens=self._answer_tokens)
            except PromptTooLong:
                budget //= 2
            else:
                # kept: later critiques begin with the size that was accepted
                self._prompt_tokens = budget
                return answer, critique
        raise PromptTooLong(f"the critic's context was exceeded {MAX_TRIES} times, each time with half of the prompt")


def _apply_to_list(texts: list[str], operation: InsightOperation) -> None:
    """Update the list that the next critique sees; strengths are kept by memory alone."""
    if operation.kind is OperationKind.ADD and operation.text not in texts:
        texts.append(operation.text)
    elif operation.kind is OperationKind.EDIT and operation.text in texts:
        texts[texts.index(operation.text)] = operation.new_text or operation.text
