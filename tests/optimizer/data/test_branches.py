"""Branches: the steps that a search chooses, and the preferences made from their continuations."""

from __future__ import annotations

from dataclasses import replace

import pytest

from memory.schema import Split, StepKind, Trust
from optimizer.config import BranchConfig
from optimizer.data.branches import BranchPoint, build_branches, choose_points
from optimizer.data.stitching import Unstitchable, stitch
from tests.optimizer.worlds import live

LOOK = ("look", "Two doors.")
RED = [("open red", "Open."), ("go", "Gold!")]
BLUE = [("open blue", "Open."), ("go", "Dust.")]


def episode(tokenizer, moves, reward=None, **fields):
    is_success = moves[-1][1] == "Gold!" if reward is None else reward == 1.0
    graded = live(moves, tokenizer=tokenizer, is_success=is_success, **fields)
    return graded if reward is None else replace(graded, reward=reward)


def branch(tokenizer, origin, position, moves, **fields):
    """Return a branch of `origin`: its steps before `position` are replayed, so they have no token ids."""
    before = [(it.tool_calls[0]["function"]["arguments"], after.content) for it, after in pairs(origin, position)]
    replayed = [(arguments.split('"')[3], says) for arguments, says in before]
    graded = episode(tokenizer, [*replayed, *moves], task=origin.trajectory.task, **fields)
    graded.trajectory.branch_of, graded.trajectory.branch_position = origin.trajectory.id, position
    for step in graded.steps[:position]:
        step.prompt_token_ids = step.output_token_ids = None
    return graded


def pairs(origin, position):
    return list(zip(origin.steps[:position:2], origin.steps[1:position:2], strict=True))


def at(origin, position, mismatch=None):
    return BranchPoint(trajectory_id=origin.trajectory.id, position=position, mismatch=mismatch)


def build(graded, points, policy=0, max_length_tokens=4096, **config):
    return build_branches(
        graded, policy=policy, points=points, config=BranchConfig(**config), max_length_tokens=max_length_tokens
    )


def test_the_step_at_which_tries_part_comes_first_and_then_the_halves_of_what_was_lost(tokenizer):
    won = episode(tokenizer, [LOOK, *RED])
    lost = episode(tokenizer, [LOOK, ("open blue", "Open."), *[(f"go {it}", f"{it}") for it in range(5)]], reward=0.0)

    points = choose_points([won, lost], policy=0, config=BranchConfig())

    assert {it.trajectory_id for it in points} == {lost.trajectory.id}
    # model calls have even positions: the tries differ at the second of seven, the fourth is the middle
    assert [it.position for it in points] == [2, 6, 10, 0, 4, 8, 12]


def test_tasks_take_turns_the_won_ones_first_and_the_number_is_bounded(tokenizer):
    graded = [episode(tokenizer, [LOOK, *BLUE], task="a", text="Vault a.")]
    graded += [episode(tokenizer, [LOOK, *rest], task="b", text="Vault b.") for rest in (RED, BLUE)]
    graded += [episode(tokenizer, [LOOK, *RED], task="c", text="Vault c.")]
    tasks = {each.trajectory.id: each.trajectory.task for each in graded}

    points = choose_points(graded, policy=0, config=BranchConfig(num_points=3))

    assert [tasks[it.trajectory_id] for it in points] == ["b", "a", "b"]
    tried = {it.key for it in points}
    others = choose_points(graded, policy=0, config=BranchConfig(), tried=tried)
    assert others and not {it.key for it in others} & tried


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("policy", 3),
        ("memory_text", "<memory>"),
        ("trust", Trust.UNTRUSTED),
        ("branch_of", "trj_of_another"),
        ("tenant", "acme"),
        ("user_id", "jane"),
        ("key_id", "key_1"),
        ("split", Split.LIVE),
    ],
)
def test_only_own_episodes_are_branched_from(tokenizer, field, value):
    lost = episode(tokenizer, [LOOK, *BLUE])
    setattr(lost.trajectory, field, value)

    assert choose_points([lost], policy=0, config=BranchConfig()) == []


def test_two_continuations_of_one_prompt_are_a_preference_of_their_own_tokens_alone(tokenizer):
    origin = episode(tokenizer, [LOOK, *BLUE])
    good, bad = branch(tokenizer, origin, 2, RED), branch(tokenizer, origin, 2, BLUE)

    built = build([origin, good, bad], [at(origin, 2)])

    (row,) = built.rows
    assert row.prompt_ids == origin.steps[2].prompt_token_ids
    assert (row.chosen_ids, row.rejected_ids) == (good.steps[2].output_token_ids, bad.steps[2].output_token_ids)
    assert set(row.chosen_mask) == set(row.rejected_mask) == {1}
    assert (len(row.chosen_mask), len(row.rejected_mask)) == (len(row.chosen_ids), len(row.rejected_ids))
    assert built.trajectory_ids == sorted(each.trajectory.id for each in (origin, good, bad))
    assert built.details() == {"num_points": 1, "num_mismatches": 0, "num_branches": 2, "num_own": 1}


def test_a_continuation_is_worth_the_mean_of_all_its_rollouts(tokenizer):
    origin = episode(tokenizer, [LOOK, *BLUE])
    lucky, bad = branch(tokenizer, origin, 2, RED), branch(tokenizer, origin, 2, BLUE)
    # the good reply again, but lost this time: a branch of the branch, after its reply
    again = branch(tokenizer, lucky, 4, [("go", "Dust.")])
    graded = [origin, lucky, bad, again]

    assert build(graded, [at(origin, 2)]).rows == []
    assert build(graded, [at(origin, 2)]).counts["ways_alike"] == 1
    assert len(build(graded, [at(origin, 2)], margin=0.5).rows) == 1
    assert len(build([origin, lucky, bad], [at(origin, 2)]).rows) == 1


def test_a_prompt_that_is_not_the_same_token_by_token_gives_no_preference(tokenizer):
    origin = episode(tokenizer, [LOOK, *BLUE])
    good, bad = branch(tokenizer, origin, 2, RED), branch(tokenizer, origin, 2, BLUE)
    good.steps[2].prompt_token_ids = [*good.steps[2].prompt_token_ids, 7]

    built = build([origin, good, bad], [at(origin, 2)])

    assert built.rows == [] and built.counts["prompts_differ"] == 1


def test_nothing_is_learned_at_a_point_whose_replay_differed(tokenizer):
    origin = episode(tokenizer, [LOOK, *BLUE])
    graded = [origin, branch(tokenizer, origin, 2, RED), branch(tokenizer, origin, 2, BLUE)]

    built = build(graded, [at(origin, 2, mismatch="step 1 answers otherwise")])

    assert (built.rows, built.num_mismatches, built.num_points) == ([], 1, 1)


def test_what_may_not_be_preferred_is_counted(tokenizer):
    origin = episode(tokenizer, [LOOK, *BLUE])
    good, bad = branch(tokenizer, origin, 2, RED), branch(tokenizer, origin, 2, BLUE)
    length = len(good.steps[2].prompt_token_ids) + len(bad.steps[2].output_token_ids)

    assert build([origin, good, bad], [at(origin, 2)], max_length_tokens=length - 1).counts["too_long"] == 1
    assert build([origin, good], [at(origin, 2)]).counts["one_way"] == 1
    good.steps[2].finish_reason = "length"
    assert build([origin, good, bad], [at(origin, 2)]).counts["cut_output"] == 1
    bad.trajectory.trust = Trust.UNTRUSTED
    assert build([origin, good, bad], [at(origin, 2)]).counts["untrusted"] == 1


def test_a_branch_gives_rows_to_no_other_method(tokenizer):
    origin = episode(tokenizer, [LOOK, *BLUE])
    good = branch(tokenizer, origin, 2, RED)

    with pytest.raises(Unstitchable, match="no_token_ids"):
        stitch(good.steps)
    assert sum(step.kind is StepKind.MODEL for step in good.steps) == 3


def test_held_out_branches_are_refused(tokenizer):
    origin = episode(tokenizer, [LOOK, *BLUE])
    good = branch(tokenizer, origin, 2, RED, split=Split.HELD_OUT)

    with pytest.raises(AssertionError, match="held-out"):
        build([origin, good], [at(origin, 2)])
