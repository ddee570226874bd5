from __future__ import annotations

from memory.insights import OperationKind
from memory.schema import Insight
from optimizer.insight_extraction import extract_insights, parse_operations
from tests.optimizer.test_insight_contrast import APPLIANCES, cook_at_random
from tests.optimizer.worlds import live

PLACE = ("kitchen", "cooking")
KNOWN = ["Read the cookbook first.", "Never use the oven."]


class ScriptedCritic:
    """Answers in turn with what it was given, and remembers what it was asked."""

    def __init__(self, *answers: str) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    async def __call__(self, messages) -> str:
        self.asked.append(messages[-1]["content"])
        return self.answers.pop(0) if self.answers else "NOTHING"


async def test_without_a_model_counting_decides():
    graded = cook_at_random(150)
    successes, failures = ([each for each in graded if each.is_success is wanted] for wanted in (True, False))

    operations = await extract_insights(successes, failures, known=[])

    assert len(operations) == len(APPLIANCES)


async def test_with_a_model_won_and_lost_tries_are_compared_then_successes_grouped():
    won, lost = (
        live([("look", "Ok.")], memory_text="<memory>\nsecret\n</memory>"),
        live([("wait", "Lost.")], is_success=False),
    )
    critic = ScriptedCritic("ADD: Look before you wait.", "AGREE 1: Look before you wait.")

    operations = await extract_insights([won], [lost], known=[], complete=critic)

    assert [operation.kind for operation in operations] == [OperationKind.ADD, OperationKind.AGREE]
    assert "> wait" in critic.asked[0] and "> look" in critic.asked[0]
    assert "1. Look before you wait." in critic.asked[1]
    assert not any("secret" in question for question in critic.asked)


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


async def test_a_critic_that_babbles_changes_nothing():
    known = [Insight(id="ins_1", environment=PLACE[0], kind=PLACE[1], text=KNOWN[0])]

    operations = await extract_insights(
        [live([("look", "Ok.")])], [], known=known, complete=ScriptedCritic("I think all is well.\nEDIT 9: what?")
    )

    assert operations == []
