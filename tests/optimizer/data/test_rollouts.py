"""Scored rollouts: the same tokens with and without memory in the prompt, built only where memory helps."""

from __future__ import annotations

import pytest

from memory.schema import Split, Trust
from optimizer.config import RolloutConfig
from optimizer.data.rollouts import build_rollouts
from optimizer.data.stitching import Unstitchable, insert_memory, plan_memory_removal, remove_memory, stitch
from tests.optimizer.data.test_rows import drift
from tests.optimizer.worlds import live

STOVE = ("cook carrot with stove", "It is fried.")
OVEN = ("cook carrot with oven", "It is roasted. You lose!")
MEMORY = "<memory>\nInsights:\n- fry the _ -> cook _ with stove\n</memory>"


def score(graded, tokenizer, policy=0, max_length_tokens=4096):
    return build_rollouts(graded, tokenizer, policy=policy, config=RolloutConfig(), max_length_tokens=max_length_tokens)


def with_memory(tokenizer, **fields):
    return live([STOVE], tokenizer=tokenizer, memory_text=MEMORY, **fields)


def without(tokenizer, **fields):
    return live([STOVE, OVEN], tokenizer=tokenizer, is_success=False, **fields)


def test_a_segment_that_is_put_in_and_taken_out_again_leaves_the_row_as_it_was(tokenizer):
    shown, bare = with_memory(tokenizer), live([STOVE], tokenizer=tokenizer)
    (row,), (seen,) = stitch(bare.steps)[0], stitch(shown.steps)[0]

    inserted = insert_memory(row, bare.trajectory, MEMORY, tokenizer)

    assert inserted == seen  # as in the engine's prompt
    assert remove_memory(inserted, plan_memory_removal(shown.trajectory, tokenizer)) == row


def test_a_prompt_that_does_not_begin_as_it_renders_takes_no_segment(tokenizer):
    bare = live([STOVE], tokenizer=tokenizer)
    (row,) = stitch(bare.steps)[0]
    bare.trajectory.opening[0]["content"] = "You bake."

    with pytest.raises(Unstitchable, match="rerender_mismatch"):
        insert_memory(row, bare.trajectory, MEMORY, tokenizer)


def test_own_tokens_stand_at_the_end_of_both_rows(tokenizer):
    own = without(tokenizer)

    (row,) = score([with_memory(tokenizer), own], tokenizer).rows

    first = row.mask.index(1)
    assert row.trajectory_id == own.trajectory.id
    assert row.teacher_ids[len(row.teacher_ids) - len(row.input_ids) + first :] == row.input_ids[first:]
    assert MEMORY in tokenizer.decode(row.teacher_ids) and MEMORY not in tokenizer.decode(row.input_ids)


def test_a_call_that_the_template_wrote_differently_is_scored_in_a_row_of_its_own(tokenizer):
    own = drift(without(tokenizer), 0, tokenizer)

    built = score([with_memory(tokenizer), own], tokenizer)

    assert len(built.rows) == 2 and all(MEMORY in tokenizer.decode(row.teacher_ids) for row in built.rows)


def test_nothing_is_taught_where_memory_does_not_win_more(tokenizer):
    won = live([STOVE], tokenizer=tokenizer)

    built = score([with_memory(tokenizer), won], tokenizer)

    assert not built.rows and built.counts["memory_did_not_help"] == 1
    assert (built.won_with_memory, built.won_without) == (1.0, 1.0)


def test_only_memory_of_the_same_policy_task_and_trust_is_in_view(tokenizer):
    own = without(tokenizer)
    other_task, untrusted, other_policy = (with_memory(tokenizer, task=task) for task in ("2", "1", "1"))
    untrusted.trajectory.trust, other_policy.trajectory.policy = Trust.UNTRUSTED, 7

    built = score([own, other_task, untrusted, other_policy], tokenizer)

    assert not built.rows and built.counts["no_memory"] == 1


def test_only_rollouts_at_temperature_one_are_scored_and_show_whether_memory_wins(tokenizer):
    shown, own, cold = with_memory(tokenizer), without(tokenizer), without(tokenizer)
    cold_with_memory = with_memory(tokenizer, is_success=False)
    for each in (cold, cold_with_memory):
        each.trajectory.temperature = 0.3

    built = score([shown, own, cold, cold_with_memory], tokenizer)

    assert built.trajectory_ids == [own.trajectory.id] and built.counts["other_temperature"] == 1
    assert built.won_with_memory == 1.0


def test_a_rollout_that_would_be_too_long_with_memory_is_left_out(tokenizer):
    own = without(tokenizer)
    (row,) = stitch(own.steps)[0]

    built = score([with_memory(tokenizer), own], tokenizer, max_length_tokens=len(row.input_ids))

    assert not built.rows and built.counts["too_long"] == 1


def test_a_held_out_rollout_is_not_scored(tokenizer):
    with pytest.raises(AssertionError, match="held-out"):
        score([without(tokenizer, split=Split.HELD_OUT)], tokenizer)
