"""Groups: the rollouts that count, and their advantages."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory.records.trajectories import measure
from memory.schema import Split, Trust
from optimizer.config import GroupConfig
from optimizer.data.groups import build_groups, leave_one_out, price_tokens
from tests.optimizer.worlds import live

STOVE = ("cook carrot with stove", "It is fried.")
OVEN = ("cook carrot with oven", "It is roasted. You lose!")


def group(graded, policy=0, max_length_tokens=4096, **config):
    return build_groups(graded, policy=policy, config=GroupConfig(**config), max_length_tokens=max_length_tokens)


def tries(tokenizer, *outcomes, **fields):
    return [
        live([STOVE if outcome else OVEN], tokenizer=tokenizer, is_success=outcome, **fields) for outcome in outcomes
    ]


@pytest.mark.parametrize("rewards", [[1.0, 0.0], [1.0, 0.0, 0.0, 0.5], [0.2, 0.9, 0.9]])
def test_an_advantage_is_the_reward_less_the_mean_of_the_others(rewards):
    for number, advantage in enumerate(leave_one_out(rewards)):
        others = rewards[:number] + rewards[number + 1 :]
        assert advantage == pytest.approx(rewards[number] - sum(others) / len(others))
    assert sum(leave_one_out(rewards)) == pytest.approx(0)


def test_a_group_without_variance_is_dropped_and_counted(tokenizer):
    graded = tries(tokenizer, True, False, task="a") + tries(tokenizer, True, True, task="b")
    graded += tries(tokenizer, False, task="c")

    built = group(graded)

    assert built.num_groups == built.num_examples == 1 and built.counts["no_variance"] == 2
    assert sorted(row.advantage for row in built.rows) == [-1.0, 1.0]
    assert built.mean_reward == pytest.approx(3 / 5)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("policy", 3, "other_policy"),
        ("memory_text", "<memory>", "with_memory"),
        ("temperature", 0.0, "other_temperature"),
        ("trust", Trust.UNTRUSTED, "untrusted"),
    ],
)
def test_only_own_rollouts_as_they_are_sampled_count(tokenizer, field, value, reason):
    own, strange = tries(tokenizer, True, False), tries(tokenizer, False)
    setattr(strange[0].trajectory, field, value)

    built = group(own + strange)

    assert built.trajectory_ids == sorted(each.trajectory.id for each in own) and built.counts[reason] == 1


def test_a_rollout_that_is_too_long_still_counts_for_the_others(tokenizer):
    won, lost = tries(tokenizer, True, False)
    long = live([STOVE] * 6, tokenizer=tokenizer, is_success=False)
    limit = max(len(it.steps[0].prompt_token_ids) + len(it.steps[0].output_token_ids) for it in (won, lost))

    built = group([won, lost, long], max_length_tokens=limit)

    assert {row.trajectory_id: row.advantage for row in built.rows} == {
        won.trajectory.id: 1.0,
        lost.trajectory.id: -0.5,
    }
    assert built.counts["too_long"] == 1


def test_a_group_without_a_row_is_not_counted(tokenizer):
    graded = [each for task in "abcd" for each in tries(tokenizer, True, False, task=task)]

    built = group(graded, max_length_tokens=10)

    assert (built.rows, built.num_examples, built.num_tasks) == ([], 0, 0) and built.counts["too_long"] == 8


def test_a_group_whose_rows_are_over_the_cap_is_not_counted(tokenizer):
    graded = [each for task in "abcd" for each in tries(tokenizer, True, False, task=task)]

    built = group(graded, max_rows=2)

    tasks = {each.trajectory.id: each.trajectory.task for each in graded}
    assert built.num_groups == built.num_tasks == len({tasks[row.trajectory_id] for row in built.rows}) < 4


def test_a_held_out_rollout_is_in_no_group(tokenizer):
    with pytest.raises(AssertionError, match="held-out"):
        group(tries(tokenizer, True, False, split=Split.HELD_OUT))


def test_with_a_price_on_tokens_the_shorter_of_two_successes_is_the_better_one(tokenizer):
    short, long = (live([STOVE] * n, tokenizer=tokenizer, is_success=True) for n in (1, 3))
    assert group([short, long]).rows == []

    built = group([short, long], token_price=1.0)

    advantages = {row.trajectory_id: row.advantage for row in built.rows}
    assert advantages[short.trajectory.id] == pytest.approx(-advantages[long.trajectory.id])
    assert advantages[short.trajectory.id] > 0
    assert built.mean_reward == 1.0


def test_at_any_price_a_long_success_beats_a_short_failure_and_failures_are_alike(tokenizer):
    won = live([STOVE] * 3, tokenizer=tokenizer, is_success=True)
    failures = [live([OVEN] * n, tokenizer=tokenizer, is_success=False) for n in (1, 3)]

    built = group([won, *failures], token_price=1000.0)

    advantages = {row.trajectory_id: row.advantage for row in built.rows}
    assert advantages == {won.trajectory.id: 0.5, **{each.trajectory.id: -0.25 for each in failures}}
    assert group(failures, token_price=1000.0).counts["no_variance"] == 1


def test_a_long_success_beats_a_short_failure_with_a_partial_reward(tokenizer):
    won = live([STOVE] * 3, tokenizer=tokenizer, is_success=True)
    partial = replace(live([OVEN], tokenizer=tokenizer, is_success=False), reward=0.9)
    # a price that costs the short one a tenth, and the long one much more
    price = 0.1 * 1000 / measure(partial.steps).output_tokens

    advantages = {row.trajectory_id: row.advantage for row in group([won, partial], token_price=price).rows}

    assert advantages[won.trajectory.id] > 0 > advantages[partial.trajectory.id]


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 100_000)), min_size=1, max_size=8),
    st.floats(0, 1e6),
)
def test_a_price_on_tokens_never_reverses_the_order_of_rewards(tries, token_price):
    rewards, num_tokens = zip(*tries, strict=True)

    priced = price_tokens(rewards, num_tokens, token_price)

    for reward, length, value in zip(rewards, num_tokens, priced, strict=True):
        assert reward / 2 <= value <= reward
        for other_reward, other_length, other_value in zip(rewards, num_tokens, priced, strict=True):
            assert other_reward >= reward or other_value <= value
            assert other_reward > reward - 1e-9 or other_value < value
            assert other_reward != reward or other_length < length or other_value <= value
