"""ExpeL's operations on insights, and their limits."""

from __future__ import annotations

import pytest

from memory.records.insights import Insights, OperationKind, SupportCounts
from memory.storage.database import Database
from memory.store import Memory
from tests.memory.episodes import add, operation, play

ADD, EDIT, AGREE, REMOVE = OperationKind.ADD, OperationKind.EDIT, OperationKind.AGREE, OperationKind.REMOVE


@pytest.fixture
def insights(database: Database) -> Insights:
    return Insights(database, max_kept=3)


def strengths(insights: Insights) -> dict[str, int]:
    return {insight.text: insight.strength for insight in insights.active("kitchen", "cooking")}


async def test_strength_starts_at_two_and_follows_the_evidence(insights: Insights):
    await insights.apply([add("fry on the stove")])
    await insights.apply([operation(AGREE, "fry on the stove"), add("open the fridge first")])
    await insights.apply([operation(EDIT, "open the fridge first", "open every door first")])
    assert strengths(insights) == {"fry on the stove": 3, "open every door first": 3}
    await insights.apply([operation(REMOVE, "fry on the stove")])
    assert strengths(insights) == {"open every door first": 3, "fry on the stove": 2}


async def test_at_zero_an_insight_is_gone_and_may_come_back_as_new(insights: Insights):
    (insight,) = await insights.apply([add("fry on the stove")])
    await insights.apply([operation(REMOVE, "fry on the stove"), operation(REMOVE, "fry on the stove")])
    assert strengths(insights) == {}
    (again,) = await insights.apply([add("fry on the stove")])
    assert (again.id, again.strength, again.removed_at) == (insight.id, 2, None)


async def test_an_insight_is_matched_by_its_text_however_it_is_written(insights: Insights):
    await insights.apply([add("  fry on\nthe stove ")])
    await insights.apply([add("Fry on the  Stove")])
    assert strengths(insights) == {"fry on the stove": 3}
    assert await insights.apply([operation(kind, "never said", "x") for kind in (AGREE, EDIT, REMOVE)]) == []


async def test_removals_come_first_and_additions_last(insights: Insights):
    await insights.apply([add("a")])
    await insights.apply([add("b"), operation(AGREE, "b"), operation(EDIT, "a", "c"), *[operation(REMOVE, "a")] * 2])
    assert strengths(insights) == {"b": 2}


async def test_a_full_list_makes_removal_cost_three(insights: Insights):
    await insights.apply([add(str(number)) for number in range(7)])
    await insights.apply([operation(AGREE, "0"), operation(AGREE, "1")])
    await insights.apply([operation(REMOVE, "0")])
    assert strengths(insights)["0"] == 2
    await insights.apply([add("7")])  # 8 = 5 over the maximum of 3
    await insights.apply([operation(REMOVE, "1"), operation(REMOVE, "2")])
    assert "1" not in strengths(insights) and "2" not in strengths(insights)


async def test_counts_are_the_latest_tally(insights: Insights):
    await insights.apply([add("a", SupportCounts(wins=3, losses=1, wins_otherwise=1, losses_otherwise=5))])
    await insights.apply([operation(AGREE, "a", counts=SupportCounts(wins=9, losses=2))])
    (insight,) = insights.active()
    assert (insight.wins, insight.losses, insight.wins_otherwise, insight.losses_otherwise) == (9, 2, 0, 0)
    await insights.apply([operation(AGREE, "a")])
    assert insights.active()[0].wins == 9


async def test_an_edit_into_a_text_that_exists_joins_the_two(insights: Insights):
    await insights.apply([add("a"), add("b"), add("gone")])
    await insights.apply([operation(REMOVE, "gone")] * 2)
    await insights.apply([operation(EDIT, "a", "B")])
    assert strengths(insights) == {"b": 3}
    await insights.apply([operation(EDIT, "b", "gone")])
    assert strengths(insights) == {"gone": 4}
    await insights.apply([operation(EDIT, "gone", "Gone")])
    assert strengths(insights) == {"Gone": 5}


async def test_texts_may_swap_places_in_one_call(insights: Insights):
    await insights.apply([add("a"), add("b")])
    await insights.apply([operation(EDIT, "a", "c"), operation(EDIT, "b", "a"), operation(EDIT, "c", "b")])
    assert strengths(insights) == {"a": 3, "b": 4}


@pytest.mark.parametrize("wrong", [add(" "), operation(EDIT, "a"), operation(EDIT, "a", " ")])
async def test_an_operation_without_words_is_refused_and_nothing_is_applied(insights: Insights, wrong):
    with pytest.raises(ValueError, match=r"needs a (text|new_text)"):
        await insights.apply([add("fine"), wrong])
    assert strengths(insights) == {}


async def test_kinds_of_task_do_not_mix(insights: Insights):
    await insights.apply([add("a")])
    assert insights.active("kitchen", "baking") == insights.active("garden") == []
    assert len(insights.active("kitchen")) == len(insights.active(kind="cooking")) == 1


async def test_the_same_tally_counted_again_makes_nothing_stronger(insights: Insights):
    await insights.apply([add("a", SupportCounts(wins=9, losses=2))])
    for kind in (AGREE, ADD, AGREE):
        await insights.apply([operation(kind, "a", counts=SupportCounts(wins=9, losses=3))])
    assert strengths(insights) == {"a": 2}
    assert insights.active()[0].losses == 3
    await insights.apply([operation(AGREE, "a", counts=SupportCounts(wins=10, losses=3))])
    assert strengths(insights) == {"a": 3}


async def test_what_lessons_were_drawn_from_is_kept_with_them(memory: Memory):
    older, newer = await play(memory), await play(memory)
    await memory.insights.apply([add("a lesson")], evidence=[(older.id, "won"), (newer.id, "won")])
    await memory.insights.apply([], evidence=[(newer.id, "won"), (newer.id, "compared")])
    assert memory.insights.read_evidence() == {(older.id, "won"), (newer.id, "won"), (newer.id, "compared")}
    assert memory.insights.read_evidence(since_id=newer.id) == {(newer.id, "won"), (newer.id, "compared")}


async def test_operations_that_are_refused_leave_their_evidence_unread(memory: Memory):
    episode = await play(memory)
    with pytest.raises(ValueError, match="an insight needs a text"):
        await memory.insights.apply([add(" ")], evidence=[(episode.id, "won")])
    assert memory.insights.read_evidence() == set()
