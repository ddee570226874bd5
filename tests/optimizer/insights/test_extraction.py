"""The critic's prompts, the insights from its answers, and its failures."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import pytest

from memory.records.insights import OperationKind
from memory.schema import Insight
from optimizer.errors import CompletionError, PromptTooLong
from optimizer.insights import extraction as insight_extraction
from optimizer.insights.critique import build_critique, choose_critique_inputs, estimate_tokens, shorten
from optimizer.insights.extraction import MAX_FAILURES_IN_A_ROW, extract_insights
from optimizer.insights.parsing import SCHEMA, parse_operations
from tests.optimizer.insights.test_contrast import APPLIANCES, cook_at_random
from tests.optimizer.worlds import live

PLACE = ("kitchen", "cooking")
KNOWN = ["Read the cookbook first.", "Never use the oven."]


class ScriptedCritic:
    """Returns the given answers in turn, and records its prompts. An exception among the answers is
    raised."""

    def __init__(self, *answers: str | Exception) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []
        self.schemas: list[dict] = []

    async def __call__(self, messages, *, schema, max_tokens) -> str:
        self.asked.append(messages[-1]["content"])
        self.schemas.append(schema)
        answer = self.answers.pop(0) if self.answers else "NOTHING"
        if isinstance(answer, Exception):
            raise answer
        return answer


class SmallCritic:
    """Refuses prompts over its context, as an engine does, counted by a tokenizer that callers do not know."""

    def __init__(self, context_tokens: int, count: Callable[[str], int]) -> None:
        self.context_tokens, self.count = context_tokens, count
        self.asked: list[str] = []
        self.num_refused = 0

    async def __call__(self, messages, *, schema, max_tokens) -> str:
        if sum(self.count(message["content"]) for message in messages) + max_tokens > self.context_tokens:
            self.num_refused += 1
            raise PromptTooLong("the prompt is too long")
        self.asked.append(messages[-1]["content"])
        return "ADD: Look before you wait for anything."


def won(task: str, *moves, **fields):
    return live(moves or [("look", "Ok.")], task=task, **fields)


def lost(task: str, *moves, **fields):
    return live(moves or [("wait", "Lost.")], task=task, is_success=False, **fields)


async def test_without_a_model_counting_decides():
    graded = cook_at_random(150)
    successes, failures = ([each for each in graded if each.is_success is wanted] for wanted in (True, False))

    extraction = await extract_insights(successes, failures, known=[])

    assert len(extraction.operations) == len(APPLIANCES)
    assert (extraction.num_asked, extraction.evidence) == (0, [])


async def test_with_a_model_won_and_lost_tries_are_compared_then_successes_grouped():
    success, failure = won("1", memory_text="<memory>\nsecret\n</memory>"), lost("1")
    critic = ScriptedCritic("ADD: Look before you wait.", "AGREE 1: Look before you wait.")

    extraction = await extract_insights([success, won("2")], [failure], known=[], complete=critic)

    assert [operation.kind for operation in extraction.operations] == [OperationKind.ADD, OperationKind.AGREE]
    assert "> wait" in critic.asked[0] and "> look" in critic.asked[0]
    assert "1. Look before you wait." in critic.asked[1]
    assert not any("secret" in question for question in critic.asked)
    assert critic.schemas == [SCHEMA, SCHEMA]


async def test_json_of_the_schema_is_applied():
    answer = json.dumps({"operations": [{"op": "ADD", "number": None, "text": "Look before you wait."}]})
    extraction = await extract_insights([won("1")], [], known=[], complete=ScriptedCritic(answer))
    assert [operation.text for operation in extraction.operations] == ["Look before you wait."]


def test_operations_are_matched_by_text_and_limited_to_four():
    answer = """Here is my critique.
- AGREE 2: Read the cookbook first
REMOVE 1: never use the oven.
EDIT 1: Read the cookbook before you take anything.
AGREE 1: something nobody said
**ADD**: Open the fridge.
ADD: One too many."""

    operations = parse_operations(answer, PLACE, KNOWN)

    assert [(operation.kind, operation.text) for operation in operations] == [
        (OperationKind.AGREE, KNOWN[0]),
        (OperationKind.REMOVE, KNOWN[1]),
        (OperationKind.EDIT, KNOWN[0]),
        (OperationKind.ADD, "Open the fridge."),
    ]


async def test_a_critic_that_babbles_changes_nothing_and_is_counted():
    known = [Insight(id="ins_1", environment=PLACE[0], kind=PLACE[1], text=KNOWN[0])]
    critic = ScriptedCritic("I think all is well, Jane Doe.")

    extraction = await extract_insights([won("1")], [], known=known, complete=critic)

    assert (extraction.operations, extraction.num_failed) == ([], 1)
    assert "no operation" in extraction.first_failure and "Jane" not in extraction.first_failure


async def test_failures_of_tasks_that_were_never_won_are_shown():
    critic = ScriptedCritic()
    await extract_insights([won("1")], [lost("1"), lost("2", ("drop knife", "Ouch."))], known=[], complete=critic)
    (never_won,) = [question for question in critic.asked if "> drop knife" in question]
    assert "Lost:" in never_won and "Won" not in never_won.split("What happened")[1]


async def test_comments_of_people_are_shown_with_their_episode():
    commented, other = won("1"), lost("2")
    comments = {commented.trajectory.id: ["It forgot the salt."], "trj_of_nobody": ["unseen"]}
    critic = ScriptedCritic()
    await extract_insights([commented], [other], known=[], complete=critic, comments=comments)
    assert [("It forgot the salt." in question, "unseen" in question) for question in critic.asked] == [
        (True, False),
        (False, False),
    ]


async def test_an_episode_is_evidence_once():
    successes, failures = [won("1"), won("2")], [lost("1"), lost("3")]
    first = await extract_insights(successes, failures, known=[], complete=ScriptedCritic())
    assert first.num_asked == 3  # the pair, the win, the loss
    assert len(first.evidence) == len({trajectory_id for trajectory_id, _ in first.evidence}) == 4
    again = await extract_insights(
        successes, failures, known=[], complete=ScriptedCritic(), already_read=set(first.evidence)
    )
    assert again.num_asked == 0
    fresh = won("2")
    third = await extract_insights(
        [*successes, fresh], failures, known=[], complete=ScriptedCritic(), already_read=set(first.evidence)
    )
    assert third.evidence == [(fresh.trajectory.id, "won")]


@pytest.mark.parametrize("first, second", [(won, lost), (lost, won)])
async def test_a_task_that_was_won_and_lost_in_different_rounds_is_compared(first, second):
    earlier, later = first("1"), second("1")
    of = {won: lambda *episodes: (list(episodes), []), lost: lambda *episodes: ([], list(episodes))}
    read = await extract_insights(*of[first](earlier), known=[], complete=ScriptedCritic())

    successes, failures = [[*ours, *theirs] for ours, theirs in zip(of[first](earlier), of[second](later), strict=True)]
    critic = ScriptedCritic()
    again = await extract_insights(successes, failures, known=[], complete=critic, already_read=set(read.evidence))

    assert again.num_asked == 1 and "Won, the same task:" in critic.asked[0]
    evidence = {*read.evidence, *again.evidence}
    assert (later.trajectory.id, "compared") in evidence
    none = await extract_insights(successes, failures, known=[], complete=critic, already_read=evidence)
    assert none.num_asked == 0


def test_no_more_is_read_than_is_allowed_and_groups_keep_their_third():
    successes, failures = [won(str(n)) for n in range(90)], [lost(str(n)) for n in range(45, 140)]
    critique_inputs = choose_critique_inputs(successes, failures, already_read=(), max_critiques=32, seed=0)
    kinds = [critique_input.kind for critique_input in critique_inputs]
    assert (len(kinds), kinds.count("compared"), kinds.count("won"), kinds.count("lost")) == (32, 22, 5, 5)


@pytest.mark.parametrize("failure", [CompletionError("the engine died"), TimeoutError(), PromptTooLong("too long")])
async def test_a_critic_that_fails_costs_its_insights_and_nothing_else(failure: Exception):
    critic = ScriptedCritic(*[failure] * (3 if isinstance(failure, PromptTooLong) else 1), "ADD: Look around first.")
    extraction = await extract_insights([won("1")], [lost("2")], known=[], complete=critic)
    assert (extraction.num_asked, extraction.num_failed) == (2, 1)
    assert [operation.text for operation in extraction.operations] == ["Look around first."]
    assert len(extraction.evidence) == 1  # episodes of a failed call may be read again


async def test_a_critic_that_is_gone_is_not_asked_for_ever():
    successes = [won(str(n), kind=str(n)) for n in range(20)]
    critic = ScriptedCritic(*[CompletionError(f"refused {n}") for n in range(20)])
    extraction = await extract_insights(successes, [], known=[], complete=critic)
    assert len(critic.asked) == MAX_FAILURES_IN_A_ROW
    assert (extraction.num_failed, extraction.num_skipped) == (MAX_FAILURES_IN_A_ROW, 20 - MAX_FAILURES_IN_A_ROW)
    assert extraction.first_failure == "CompletionError: refused 0"


async def test_a_silent_critic_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch):
    async def silent(messages, *, schema, max_tokens) -> str:
        await asyncio.sleep(3600)
        raise AssertionError

    monkeypatch.setattr(insight_extraction, "CRITIQUE_SECONDS", 0.01)
    extraction = await extract_insights([won("1")], [], known=[], complete=silent)
    assert extraction.first_failure == "TimeoutError: no answer in 0.01 seconds"


async def test_a_fault_of_our_own_is_not_taken_for_the_critics():
    with pytest.raises(KeyError):
        await extract_insights([won("1")], [], known=[], complete=ScriptedCritic(KeyError("ours")))


async def test_eight_episodes_with_files_in_their_arguments_fit_the_critics_context():
    file = "\n".join(f"line {n}: x = compute({n}, 'abc') + 3.14159" for n in range(2000))
    successes = [won(str(n), (file, f"wrote {len(file)} bytes"), (f"run {n}", file)) for n in range(8)]
    critic = SmallCritic(8192, lambda text: len(text) // 2)  # more tokens than any tokenizer gives

    extraction = await extract_insights(successes, [], known=[], complete=critic, context_tokens=8192)

    assert (extraction.num_failed, len(extraction.evidence)) == (0, 8)
    assert critic.asked[0].count("Won:") == 8 and "characters left out" in critic.asked[0]
    assert "> run 7" in critic.asked[0]


async def test_an_estimate_that_was_too_low_is_mended_by_asking_for_less():
    successes = [won(str(n), ("say " + "word " * 800, "Ok.")) for n in range(8)]
    critic = SmallCritic(8192, len)  # one token a character
    extraction = await extract_insights(successes, [], known=[], complete=critic, context_tokens=8192)
    assert extraction.num_failed == 0 and critic.num_refused > 0
    assert extraction.operations


@pytest.mark.parametrize("max_tokens", [700, 1000, 1500, 3000, 20_000])
def test_what_does_not_fit_is_left_out_in_order_and_said(max_tokens: int):
    moves = [(f"go {n} " + "far " * 100, "You see " + "a tree, " * 100) for n in range(30)]
    (critique_input,) = choose_critique_inputs(
        [won(str(n), *moves) for n in range(8)], [], already_read=(), max_critiques=1, seed=0
    )
    critique = build_critique(critique_input, KNOWN, comments={}, max_tokens=max_tokens)
    text = critique.messages[-1]["content"]
    assert sum(estimate_tokens(message["content"]) for message in critique.messages) <= max_tokens
    assert text.count("Won:") == len(critique.shown)
    assert ("episodes left out" in text) == (len(critique.shown) < 8)
    assert "characters left out" in text


async def test_without_room_for_an_episode_the_reading_fails_and_says_the_mend():
    extraction = await extract_insights([won("1")], [], known=[], complete=ScriptedCritic(), context_tokens=256)
    assert extraction.num_failed == 1 and "engine.max_model_len" in extraction.first_failure


def test_a_shortened_text_keeps_both_ends_and_says_what_is_missing():
    text = shorten("a" * 500 + "b" * 500, 90)
    assert text == f"{'a' * 60} [... 910 characters left out ...] {'b' * 30}"
    assert shorten("short\n\n  text ", 90) == "short\n  text"
