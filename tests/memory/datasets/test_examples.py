"""Imported examples: stored once per tenant, learned from only if their key may teach, never shown to users."""

from __future__ import annotations

from dataclasses import replace

import pytest

from memory.datasets.examples import AddedExamples, Origin, content_of
from memory.errors import UnknownExample
from memory.formats.content import ExampleKind
from memory.schema import Example, Trust, next_sequence, sequence_of
from memory.storage.sequence import continue_sequence
from memory.store import Memory
from tests.memory.formats.rows import DEMONSTRATION, LABEL, PLAIN, PREFERENCE, REWARDED, say

ALL = [DEMONSTRATION, PREFERENCE, LABEL, REWARDED]
KITCHEN = Origin(environment="kitchen", source="a.jsonl", format="openai")


def learnable(memory: Memory, kind: ExampleKind = ExampleKind.DEMONSTRATION, limit: int = 100) -> list[Example]:
    return [it.example for it in memory.examples.learnable(kind, environments=("kitchen",), limit=limit)]


async def test_what_is_stored_is_read_as_it_was(memory: Memory):
    await memory.examples.add(ALL, KITCHEN)
    rows = memory.examples.select()
    assert [content_of(row) for row in reversed(rows)] == ALL
    assert {(row.environment, row.source, row.format, row.key_id) for row in rows} == {
        ("kitchen", "a.jsonl", "openai", None)
    }
    assert content_of(memory.examples.get(rows[0].id)) == REWARDED


async def test_a_second_import_adds_nothing_and_a_tenant_has_each_row_once(memory: Memory):
    assert await memory.examples.add([*ALL, PLAIN, PLAIN], KITCHEN) == AddedExamples(5, 1, teaches=True)
    assert await memory.examples.add([PLAIN, *ALL], replace(KITCHEN, source="b.jsonl")) == AddedExamples(
        0, 5, teaches=True
    )
    # the same text for another environment, with another label or of another tenant is another example
    assert await memory.examples.add([PLAIN], replace(KITCHEN, environment="")) == AddedExamples(1, 0, teaches=True)
    assert await memory.examples.add([replace(LABEL, is_good=True)], KITCHEN) == AddedExamples(1, 0, teaches=True)
    assert await memory.examples.add(ALL, replace(KITCHEN, tenant="shop")) == AddedExamples(4, 0)
    assert sum(number for *_, number in memory.examples.count()) == 7


async def test_examples_are_listed_counted_and_deleted_in_their_tenant(memory: Memory):
    await memory.examples.add(ALL, KITCHEN)
    await memory.examples.add([PLAIN], replace(KITCHEN, tenant="shop", source="b.jsonl"))
    assert memory.examples.count() == [
        (ExampleKind.DEMONSTRATION, "kitchen", "a.jsonl", 2),
        (ExampleKind.LABEL, "kitchen", "a.jsonl", 1),
        (ExampleKind.PREFERENCE, "kitchen", "a.jsonl", 1),
    ]
    (theirs,) = memory.examples.select(tenant="shop")
    with pytest.raises(UnknownExample, match="list them"):
        memory.examples.get(theirs.id, tenant="")
    with pytest.raises(UnknownExample):
        await memory.examples.delete(theirs.id, tenant="")
    assert await memory.examples.delete_source("b.jsonl") == 0
    first, *others = memory.examples.select(limit=3)
    assert memory.examples.select(before_id=others[-1].id, limit=3)[0].id < others[-1].id
    await memory.examples.delete(first.id, tenant="")
    assert await memory.examples.delete_source("a.jsonl") == 3
    assert memory.examples.select() == [] and memory.examples.select(tenant="shop") == [theirs]


@pytest.mark.parametrize(
    ("tenant", "scopes", "does_teach"),
    [
        ("", None, True),
        ("", ["learn"], False),
        ("", ["learn", "teach"], True),
        ("", ["admin"], True),
        ("shop", None, False),
        ("shop", ["learn", "teach"], True),
        ("shop", ["admin"], False),
    ],
)
async def test_an_example_teaches_as_the_key_that_imported_it(memory: Memory, tenant, scopes, does_teach):
    key_id = None
    if scopes is not None:
        key, _ = await memory.keys.create("importer", scopes, tenant=tenant)
        key_id = key.id
    await memory.examples.add([PLAIN], replace(KITCHEN, tenant=tenant, key_id=key_id))
    kind, environments = ExampleKind.DEMONSTRATION, ("kitchen",)
    assert memory.examples.count_learnable(kind, environments=environments) == len(learnable(memory)) == does_teach
    assert memory.examples.count_without_teacher(environments=environments) == (not does_teach)


async def test_an_example_teaches_from_the_moment_that_somebody_who_may_teach_imports_it(memory: Memory):
    key, _ = await memory.keys.create("a colleague", ["learn"])
    await memory.examples.add([PLAIN], replace(KITCHEN, key_id=key.id))
    await memory.examples.add([DEMONSTRATION], replace(KITCHEN, trust=Trust.UNTRUSTED))
    assert learnable(memory) == []
    added = await memory.examples.add([PLAIN, DEMONSTRATION], KITCHEN)
    assert added == AddedExamples(0, 2, num_raised=2, teaches=True) and len(learnable(memory)) == 2
    # another import does not take it back
    assert await memory.examples.add([PLAIN], replace(KITCHEN, key_id=key.id)) == AddedExamples(0, 1)
    assert len(learnable(memory)) == 2


async def test_weights_learn_from_trusted_successes_of_their_environment(memory: Memory):
    await memory.examples.add([REWARDED, replace(REWARDED, reward=1.0)], KITCHEN)
    await memory.examples.add([PLAIN], replace(KITCHEN, trust=Trust.UNTRUSTED))
    await memory.examples.add([DEMONSTRATION], replace(KITCHEN, environment="garden"))
    assert [row.reward for row in learnable(memory)] == [1.0]


async def test_good_and_bad_labels_are_counted(memory: Memory):
    await memory.examples.add([LABEL, replace(LABEL, is_good=True), replace(LABEL, prompt=[], is_good=True)], KITCHEN)
    num = [
        memory.examples.count_learnable(ExampleKind.LABEL, environments=("kitchen",), is_good=it)
        for it in (True, False, None)
    ]
    assert num == [2, 1, 3]


async def test_an_import_of_many_does_not_push_out_those_of_others(memory: Memory):
    key, _ = await memory.keys.create("a flood", ["learn", "teach"])
    await memory.examples.add([PLAIN, DEMONSTRATION], KITCHEN)
    flood = [replace(PLAIN, completion=[say("assistant", str(number))]) for number in range(50)]
    await memory.examples.add(flood, replace(KITCHEN, key_id=key.id))
    taken = learnable(memory, limit=6)
    assert [row.key_id for row in taken].count(None) == 2 and len(taken) == 6
    assert [row.completion[0]["content"] for row in taken if row.key_id] == ["46", "47", "48", "49"]


async def test_an_example_is_shown_to_nobody_and_is_no_episode(memory: Memory):
    await memory.examples.add([PLAIN], Origin())
    await memory.index.drain()
    found = await memory.retrieval.retrieve(environment="", kind="chat", query_text="What is 6 times 7?")
    assert found.text == "" and memory.trajectories.learnable() == [] and memory.trajectories.select() == []


async def test_ids_go_on_behind_examples(memory: Memory, monkeypatch: pytest.MonkeyPatch):
    await memory.examples.add([PLAIN], KITCHEN)
    (row,) = memory.examples.select()
    monkeypatch.setattr("memory.schema._latest_sequence", 0)
    monkeypatch.setattr("memory.schema.time.time_ns", lambda: 1_000)
    continue_sequence(memory.database)
    assert next_sequence() >= sequence_of(row.id)
