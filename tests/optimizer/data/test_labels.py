"""Labels: the episodes that become good and bad rows, and the tokens that are labelled."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from memory.datasets.examples import Origin, TaughtExample, make_example
from memory.formats.content import ExampleContent, ExampleKind
from memory.records.feedback import Correction
from memory.schema import Split, Trust
from memory.teaching import Teacher
from optimizer.config import LabelConfig, TeachingConfig
from optimizer.data.labels import Label, build_labels
from tests.optimizer.worlds import live, say

TAKE = ("take carrot", "You have the carrot.")
STOVE = ("cook carrot with stove", "It is fried.")
OVEN = ("cook carrot with oven", "It is roasted. You lose!")
MEMORY = "<memory>\nInsights:\n- fry the _ -> cook _ with stove\n</memory>"


def label(graded, tokenizer, max_length_tokens=4096, corrections=(), teaching=None, examples=(), **config):
    return build_labels(
        graded,
        tokenizer,
        config=LabelConfig(**config),
        max_length_tokens=max_length_tokens,
        corrections=corrections,
        teaching=teaching,
        examples=examples,
    )


def own_text(row: Label, tokenizer) -> str:
    return tokenizer.decode([token for token, own in zip(row.input_ids, row.mask, strict=True) if own])


def test_all_tokens_of_the_agent_and_no_other_carry_the_label_of_the_episode(tokenizer):
    built = label([live([TAKE, OVEN], tokenizer=tokenizer, is_success=False)], tokenizer)

    (row,) = built.rows
    assert not row.is_desirable and "It is roasted" not in own_text(row, tokenizer)
    assert own_text(row, tokenizer) == "".join(say(command) + "<|im_end|>" for command, _ in (TAKE, OVEN))


def test_good_and_bad_episodes_of_different_tasks_need_no_pair(tokenizer):
    graded = [live([STOVE], tokenizer=tokenizer, task=f"good-{n}") for n in range(3)]
    graded += [live([OVEN], tokenizer=tokenizer, task=f"bad-{n}", is_success=False) for n in range(2)]

    built = label(graded, tokenizer)

    assert built.details() == {"num_good": 3, "num_bad": 2} and built.num_examples == 2 and built.num_tasks == 5
    assert built.trajectory_ids == sorted(each.trajectory.id for each in graded)


def test_the_memory_segment_is_taken_out(tokenizer):
    (row,) = label([live([STOVE], tokenizer=tokenizer, memory_text=MEMORY)], tokenizer).rows

    assert "<memory>" not in tokenizer.decode(row.input_ids)


def test_a_success_that_should_not_be_imitated_is_no_good_example(tokenizer):
    clumsy = live([STOVE], tokenizer=tokenizer, num_invalid_tool_calls=1)
    fixed = live([STOVE], tokenizer=tokenizer, task="2")
    correction = Correction(fixed.trajectory, fixed.steps[0], "Better.", Teacher())

    built = label([clumsy, fixed], tokenizer, corrections=[correction])

    assert not built.rows
    assert built.counts["invalid_tool_calls"] == 1 and built.counts["corrected"] == 1


def test_an_untrusted_failure_is_not_unlearned(tokenizer):
    lost = live([OVEN], tokenizer=tokenizer, is_success=False)
    lost.trajectory.trust = Trust.UNTRUSTED

    built = label([lost], tokenizer)

    assert not built.rows and built.counts["untrusted"] == 1


def test_a_task_gives_its_newest_different_episodes_of_each_kind(tokenizer):
    older, newer = live([STOVE], tokenizer=tokenizer), live([TAKE, STOVE], tokenizer=tokenizer)
    again = live([TAKE, STOVE], tokenizer=tokenizer)
    lost = live([OVEN], tokenizer=tokenizer, is_success=False)

    built = label([older, newer, again, lost], tokenizer, per_task=1)

    assert set(built.trajectory_ids) == {again.trajectory.id, lost.trajectory.id}
    assert label([newer, again], tokenizer, per_task=2).counts["duplicate"] == 1


def test_one_teacher_gives_no_more_rows_than_the_bounds_allow(tokenizer):
    bob = Teacher(key_id="key_1", user_id="bob")
    graded = [
        replace(live([STOVE], tokenizer=tokenizer, task=str(n), is_success=n % 2 == 0), teacher=bob) for n in range(8)
    ]

    built = label(graded, tokenizer, teaching=TeachingConfig(max_rows_per_user=3))

    assert len(built.rows) == len(built.teachers) == 3 and built.counts["over_user_cap"] == 5


def test_imported_labels_count_under_the_same_bounds_and_are_named_by_their_rows(tokenizer):
    def taught(number: int) -> TaughtExample:
        prompt, reply = {"role": "user", "content": f"fry {number}?"}, {"role": "assistant", "content": "stove"}
        content = ExampleContent(kind=ExampleKind.LABEL, prompt=[prompt], completion=[reply], is_good=bool(number % 2))
        return TaughtExample(
            make_example(content, Origin(environment="kitchen"), f"digest-{number}"), Teacher(key_id="key_2")
        )

    examples = [taught(number) for number in range(6)]
    built = label([], tokenizer, examples=examples, teaching=TeachingConfig(max_rows_per_key=4))

    assert len(built.rows) == 4 and built.counts["over_key_cap"] == 2
    assert set(built.trajectory_ids) <= {each.example.id for each in examples} and len(built.trajectory_ids) == 4
    assert {own_text(row, tokenizer) for row in built.rows} == {"stove<|im_end|>"}
    every = label([], tokenizer, examples=examples)
    assert Counter(row.is_desirable for row in every.rows) == {True: 3, False: 3} and every.num_tasks == 6


def test_a_label_that_is_too_long_leaves_out_its_episode(tokenizer):
    built = label([live([TAKE, STOVE], tokenizer=tokenizer)], tokenizer, max_length_tokens=50)

    assert not built.rows and built.counts["too_long"] == 1


def test_a_held_out_episode_is_no_label(tokenizer):
    with pytest.raises(AssertionError, match="held-out"):
        label([live([STOVE], tokenizer=tokenizer, split=Split.HELD_OUT)], tokenizer)
