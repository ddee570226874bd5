"""A team's episode as rows: separate rows for each role, with its own credit."""

from __future__ import annotations

import pytest

from memory.conversation import restore_messages
from memory.team import Role
from optimizer.config import (
    BranchConfig,
    DemonstrationConfig,
    GroupConfig,
    LabelConfig,
    PreferenceConfig,
    RolloutConfig,
)
from optimizer.data.branches import build_branches, choose_points
from optimizer.data.demonstrations import build_demonstrations
from optimizer.data.groups import build_groups
from optimizer.data.labels import build_labels
from optimizer.data.preferences import build_preferences
from optimizer.data.roles import split_roles
from optimizer.data.rollouts import build_rollouts
from optimizer.verifier.rows import frame_question, render_episode
from tests.optimizer.worlds import live, live_team, say

MEMORY = "<memory>\nInsights:\n- fry the _ -> cook _ with stove\n</memory>"
REVISED = {"answers": ("Raw.", "Cooked."), "checks": ("REVISE: it is raw", "ACCEPT")}
SENT_BACK = {"answers": ("Raw.", "Cooked."), "checks": ("REVISE: it is raw",)}
MOVES = [("take carrot", "You have the carrot."), ("cook carrot with stove", "It is fried. You win!")]


def demonstrate(graded, tokenizer, keep=0.0):
    config = DemonstrationConfig(keep_memory_share=keep)
    return build_demonstrations(graded, tokenizer, config=config, max_length_tokens=8192)


def prefer(graded, tokenizer, **config):
    return build_preferences(graded, tokenizer, config=PreferenceConfig(**config), max_length_tokens=8192)


def own_texts(rows, tokenizer) -> list[str]:
    return [
        tokenizer.decode([token for token, own in zip(row.input_ids, row.mask, strict=True) if own]) for row in rows
    ]


def own_tokens(graded) -> list[int]:
    return sorted(token for step in graded.model_steps for token in step.output_token_ids)


@pytest.mark.parametrize("memory_text", ["", MEMORY])
@pytest.mark.parametrize("story", [{}, REVISED])
def test_every_token_of_every_role_is_trained_once_and_no_role_goes_on_with_anothers(tokenizer, memory_text, story):
    played = live_team(tokenizer=tokenizer, memory_text=memory_text, **story)

    built = demonstrate([played], tokenizer)

    trained = sorted(token for row in built.rows for token, own in zip(row.input_ids, row.mask, strict=True) if own)
    assert trained == own_tokens(played) and built.trained_share == 1.0
    end = "<|im_end|>"
    actor = end.join([say("take carrot"), *story.get("answers", ["It is done."]), ""])
    checks = [f"{check}{end}" for check in story.get("checks", ["ACCEPT"])]
    assert sorted(own_texts(built.rows, tokenizer)) == sorted([f"Take it, then cook it.{end}", actor, *checks])


def test_the_actors_row_keeps_the_plan_and_loses_the_memory(tokenizer):
    shown, bare = (live_team(tokenizer=tokenizer, memory_text=text) for text in (MEMORY, ""))
    with_memory, without = (demonstrate([each], tokenizer).rows for each in (shown, bare))
    assert [row.input_ids for row in with_memory] == [row.input_ids for row in without]
    (planned,) = [text for row in without if "A plan, which may be wrong" in (text := tokenizer.decode(row.input_ids))]
    assert say("take carrot") in planned


def test_memory_that_is_kept_is_the_actors_alone(tokenizer):
    built = demonstrate([live_team(tokenizer=tokenizer, memory_text=MEMORY)], tokenizer, keep=1.0)
    assert sorted(row.has_memory for row in built.rows) == [False, False, True]


def credits_of(graded) -> list[tuple[Role, bool]]:
    return [(part.role, part.is_success) for part in split_roles([graded])]


@pytest.mark.parametrize(
    ("check", "is_success", "is_right"),
    [
        ("ACCEPT", True, True),
        ("ACCEPT", False, False),
        ("REVISE: no", True, False),  # the budget was spent, so the answer was final
        ("REVISE: no", False, True),
        ("I cannot say", True, False),
        ("I cannot say", False, False),
    ],
)
def test_the_checker_is_right_when_it_agrees_with_the_reward_of_the_answer_that_it_read(
    tokenizer, check, is_success, is_right
):
    played = live_team(tokenizer=tokenizer, checks=(check,), is_success=is_success)
    expected = [(Role.PLANNER, is_success), (Role.ACTOR, is_success), (Role.CHECKER, is_right)]
    assert credits_of(played) == expected


@pytest.mark.parametrize("is_success", [True, False])
def test_a_check_of_an_answer_that_was_then_changed_is_worth_what_came_of_it(tokenizer, is_success):
    played = live_team(tokenizer=tokenizer, is_success=is_success, **SENT_BACK)
    assert credits_of(played)[-1] == (Role.CHECKER, is_success)
    insisted = live_team(
        tokenizer=tokenizer, answers=("Raw.", "Raw."), checks=SENT_BACK["checks"], is_success=is_success
    )
    assert credits_of(insisted)[-1] == (Role.CHECKER, not is_success)


def test_an_accepted_failure_is_a_bad_check_and_a_failure_that_was_sent_back_in_vain_a_good_one(tokenizer):
    lost = live_team(tokenizer=tokenizer, is_success=False)
    seen = live_team(tokenizer=tokenizer, is_success=False, checks=("REVISE: no",), task="2")
    built = build_labels([lost, seen], tokenizer, config=LabelConfig(), max_length_tokens=8192)
    by_text = dict(zip(own_texts(built.rows, tokenizer), [row.is_desirable for row in built.rows], strict=True))
    assert by_text["ACCEPT<|im_end|>"] is False and by_text["REVISE: no<|im_end|>"] is True
    assert [each for text, each in by_text.items() if "ACCEPT" not in text and "REVISE" not in text] == [False] * 2


def test_preferences_compare_replies_of_one_role_to_the_same_prompt(tokenizer):
    won = [live_team(tokenizer=tokenizer, command="cook carrot with stove") for _ in range(2)]
    lost = [live_team(tokenizer=tokenizer, command="cook carrot with oven", is_success=False) for _ in range(2)]
    built = prefer([*won, *lost], tokenizer)
    texts = {(tokenizer.decode(row.chosen_ids), tokenizer.decode(row.rejected_ids)) for row in built.rows}
    stove, oven = (say(f"cook carrot with {it}") + "<|im_end|>" for it in ("stove", "oven"))
    assert texts == {(stove, oven)} and built.num_tasks == 1
    assert all("A plan, which may be wrong" in tokenizer.decode(row.prompt_ids) for row in built.rows)


def test_one_lost_game_does_not_condemn_a_plan_that_many_moves_followed_and_several_do(tokenizer):
    def tries(number):
        good = [live_team(tokenizer=tokenizer, plan="Look first.", **SENT_BACK) for _ in range(number)]
        bad = [live_team(tokenizer=tokenizer, plan="Run.", is_success=False, **SENT_BACK) for _ in range(number)]
        return [*good, *bad]

    def plans(built):
        return [row for row in built.rows if "Run." in tokenizer.decode(row.rejected_ids)]

    assert plans(prefer(tries(1), tokenizer)) == []
    (row,) = plans(prefer(tries(2), tokenizer))
    assert tokenizer.decode(row.chosen_ids) == "Look first.<|im_end|>"
    assert "Plan." in tokenizer.decode(row.prompt_ids)


def test_each_role_has_its_own_group_and_the_checkers_advantage_is_its_own(tokenizer):
    played = [
        live_team(tokenizer=tokenizer),
        live_team(tokenizer=tokenizer, is_success=False, checks=("REVISE: no",)),
        live_team(tokenizer=tokenizer, is_success=False),
    ]
    built = build_groups(played, policy=0, config=GroupConfig(), max_length_tokens=8192)
    advantages = list(zip(own_texts(built.rows, tokenizer), [row.advantage for row in built.rows], strict=True))
    assert sorted(each for text, each in advantages if "REVISE" in text or "ACCEPT" in text) == [-1.0, 0.5, 0.5]
    assert sorted(each for text, each in advantages if text.startswith("Take it")) == [-0.5, -0.5, 1.0]
    assert built.num_groups == built.num_tasks == 1 and built.mean_reward == pytest.approx(1 / 3)
    assert len(built.rows) == 9


def test_distillation_teaches_the_actor_alone(tokenizer):
    shown = live_team(tokenizer=tokenizer, memory_text=MEMORY)
    own = live_team(tokenizer=tokenizer, is_success=False)
    built = build_rollouts([shown, own], tokenizer, policy=0, config=RolloutConfig(), max_length_tokens=8192)
    (row,) = built.rows
    assert "cook _ with stove" in tokenizer.decode(row.teacher_ids) and "A plan" in tokenizer.decode(row.input_ids)


def test_a_search_does_not_branch_from_a_team_and_a_verifier_reads_the_actor(tokenizer):
    lost = live_team(tokenizer=tokenizer, is_success=False)
    assert choose_points([lost], policy=0, config=BranchConfig()) == []
    built = build_branches([lost], policy=0, points=[], config=BranchConfig(), max_length_tokens=8192)
    assert built.counts["by_a_team"] == 1
    prompt = render_episode(lost.trajectory, lost.steps, tokenizer, frame_question(tokenizer), 8192)
    assert "It is done." in (text := tokenizer.decode(prompt)) and "ACCEPT" not in text


def test_a_single_agents_episode_is_one_part_with_all_of_its_steps(tokenizer):
    graded = [live(MOVES, tokenizer=tokenizer), live(MOVES[:1], tokenizer=tokenizer, is_success=False)]
    parts = split_roles(graded)
    assert [part.steps for part in parts] == [each.steps for each in graded]
    assert [(part.reward, part.is_success, part.teacher) for part in parts] == [
        (each.reward, each.is_success, each.teacher) for each in graded
    ]


def test_an_actors_messages_are_restored_with_the_note_and_without_the_plan_and_the_checks(tokenizer):
    played = live_team(tokenizer=tokenizer, **REVISED)
    texts = [message["content"] for message in restore_messages(played.steps)]
    assert texts == ["", "Taken.", "Raw.", "Again.", "Cooked."]
