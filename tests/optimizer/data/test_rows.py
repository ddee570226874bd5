from __future__ import annotations

import pytest

from memory.schema import Split
from optimizer.config import DemonstrationConfig, PreferenceConfig
from optimizer.data.demonstrations import build_demonstrations
from optimizer.data.preferences import build_preferences
from optimizer.data.rows import read_rows, write_rows
from tests.optimizer.worlds import live, say

TAKE = ("take carrot", "You have the carrot.")
STOVE = ("cook carrot with stove", "It is fried.")
OVEN = ("cook carrot with oven", "It is roasted. You lose!")
EAT = ("eat meal", "You win!")
LOOK = ("look", "A kitchen.")
SHUT = ("shut door", "A kitchen.")
MEMORY = "<memory>\nInsights:\n- fry the _ -> cook _ with stove\n</memory>"


def demonstrate(graded, tokenizer, max_length_tokens=4096, **config):
    config = DemonstrationConfig(**{"keep_memory_share": 0.0, **config})
    return build_demonstrations(graded, tokenizer, config=config, max_length_tokens=max_length_tokens)


def weigh(graded, tokenizer, max_length_tokens=4096, **config):
    return build_preferences(graded, tokenizer, config=PreferenceConfig(**config), max_length_tokens=max_length_tokens)


def drift(played, step: int, tokenizer):
    """Change a sampled reply so that the template renders it differently into the next prompt."""
    sampled = played.model_steps[step]
    said = tokenizer.decode(sampled.output_token_ids).replace('": ', '":')
    sampled.output_token_ids = tokenizer(said, add_special_tokens=False)["input_ids"]
    return played


def own_text(ids, mask, tokenizer) -> str:
    return tokenizer.decode([token for token, mine in zip(ids, mask, strict=True) if mine])


def test_only_successes_without_broken_calls_are_imitated(tokenizer):
    won = live([TAKE, STOVE, EAT], tokenizer=tokenizer)
    lost = live([TAKE, OVEN], tokenizer=tokenizer, is_success=False)
    clumsy = live([LOOK, STOVE, EAT], tokenizer=tokenizer, num_invalid_tool_calls=1)

    built = demonstrate([won, lost, clumsy], tokenizer)

    assert built.trajectory_ids == [won.trajectory.id]
    assert built.counts["not_a_success"] == 1 and built.counts["invalid_tool_calls"] == 1


def test_a_task_gives_its_shortest_different_successes(tokenizer):
    short = live([STOVE, EAT], tokenizer=tokenizer)
    again = live([STOVE, EAT], tokenizer=tokenizer)
    longer = live([TAKE, STOVE, EAT], tokenizer=tokenizer)
    longest = live([LOOK, TAKE, STOVE, EAT], tokenizer=tokenizer)

    built = demonstrate([longest, again, longer, short], tokenizer, per_task=2)

    assert built.trajectory_ids == sorted([short.trajectory.id, longer.trajectory.id])
    assert built.counts["duplicate"] == 1 and built.counts["over_task_cap"] == 1


def test_the_memory_segment_stays_in_about_the_share_that_was_asked_for(tokenizer):
    graded = [live([STOVE, EAT], tokenizer=tokenizer, task=str(n), memory_text=MEMORY) for n in range(60)]

    built = demonstrate(graded, tokenizer, keep_memory_share=0.25)

    with_memory = [row for row in built.rows if row.has_memory]
    assert 6 <= len(with_memory) <= 26
    assert all("<memory>" in tokenizer.decode(row.input_ids) for row in with_memory)
    assert built.tokens_kept < built.tokens_shown


def test_a_row_that_is_too_long_is_left_out_whole(tokenizer):
    built = demonstrate([live([STOVE, EAT], tokenizer=tokenizer)], tokenizer, max_length_tokens=50)

    assert not built.rows and built.counts["too_long"] == 1


@pytest.mark.parametrize("build", [demonstrate, weigh])
def test_held_out_tasks_stop_everything(tokenizer, build):
    held_out = live([STOVE, EAT], tokenizer=tokenizer, split=Split.HELD_OUT)

    with pytest.raises(AssertionError, match="held-out"):
        build([held_out], tokenizer)


def test_a_preference_parts_at_the_first_differing_step(tokenizer):
    won = live([TAKE, STOVE, EAT], tokenizer=tokenizer)
    lost = live([TAKE, OVEN], tokenizer=tokenizer, is_success=False)

    (row,) = weigh([won, lost], tokenizer, scope="remainder").rows

    assert tokenizer.decode(row.prompt_ids).endswith("<|im_start|>assistant\n")
    assert "You have the carrot." in tokenizer.decode(row.prompt_ids)
    assert tokenizer.decode(row.rejected_ids) == say("cook carrot with oven") + "<|im_end|>"
    assert tokenizer.decode(row.chosen_ids).endswith(say("eat meal") + "<|im_end|>")
    own = [token for token, mine in zip(row.chosen_ids, row.chosen_mask, strict=True) if mine]
    assert tokenizer.decode(own) == say("cook carrot with stove") + "<|im_end|>" + say("eat meal") + "<|im_end|>"


def test_by_default_both_sides_end_with_the_differing_step(tokenizer):
    won = live([TAKE, STOVE, EAT], tokenizer=tokenizer)
    lost = live([TAKE, OVEN], tokenizer=tokenizer, is_success=False)

    (row,) = weigh([won, lost], tokenizer).rows

    assert tokenizer.decode(row.chosen_ids) == say("cook carrot with stove") + "<|im_end|>"
    assert all(row.chosen_mask)


def test_episodes_that_were_shown_different_memory_can_be_weighed(tokenizer):
    won = live([TAKE, STOVE, EAT], tokenizer=tokenizer, memory_text=MEMORY)
    lost = live([TAKE, OVEN], tokenizer=tokenizer, is_success=False)

    (row,) = weigh([won, lost], tokenizer).rows

    assert "<memory>" not in tokenizer.decode(row.prompt_ids)


def test_a_parting_nearer_the_end_is_preferred(tokenizer):
    won = live([TAKE, STOVE, EAT], tokenizer=tokenizer)
    early = live([LOOK, TAKE, OVEN], tokenizer=tokenizer, is_success=False)
    late = live([TAKE, OVEN], tokenizer=tokenizer, is_success=False)

    built = weigh([won, early, late], tokenizer, per_task=1)

    assert [row.rejected_trajectory_id for row in built.rows] == [late.trajectory.id]
    assert built.counts["no_evidence"] == 1


def test_a_difference_long_before_the_loss_is_no_evidence_until_several_tries_agree(tokenizer):
    def tries(num_tries: int):
        for number in range(num_tries):
            rest = [(f"open door {number}", "It is open."), ("take knife", "Taken."), TAKE]
            yield live([LOOK, *rest, STOVE, EAT], tokenizer=tokenizer)
            yield live([SHUT, *rest, OVEN], tokenizer=tokenizer, is_success=False)

    once, twice = weigh(tries(1), tokenizer), weigh(tries(2), tokenizer)

    assert (len(once.rows), once.counts["no_evidence"]) == (0, 1)
    (row,) = twice.rows
    assert tokenizer.decode(row.chosen_ids).startswith(say("look"))
    assert tokenizer.decode(row.rejected_ids).startswith(say("shut door"))


def test_a_reply_that_loses_no_more_often_than_another_is_not_rejected_for_it(tokenizer):
    unlucky = [live([TAKE, OVEN], tokenizer=tokenizer, is_success=False) for _ in range(2)]
    lucky = [live([TAKE, OVEN], tokenizer=tokenizer) for _ in range(2)]
    other = [live([TAKE, STOVE], tokenizer=tokenizer, is_success=False), live([TAKE, STOVE], tokenizer=tokenizer)]

    built = weigh([*unlucky, *lucky, *other], tokenizer)

    # two replies were compared, once
    assert built.rows == [] and built.counts["no_evidence"] == 1


def test_a_win_with_an_invalid_call_is_evidence_for_its_replies(tokenizer):
    clumsy = [live([TAKE, STOVE], tokenizer=tokenizer, num_invalid_tool_calls=1) for _ in range(3)]
    lost = live([TAKE, STOVE], tokenizer=tokenizer, is_success=False)
    won = live([TAKE, OVEN], tokenizer=tokenizer)

    built = weigh([*clumsy, lost, won], tokenizer)

    assert built.rows == [] and built.counts["no_evidence"] == 1


def test_a_win_with_an_invalid_call_is_no_chosen_side(tokenizer):
    clumsy = live([TAKE, STOVE], tokenizer=tokenizer, num_invalid_tool_calls=1)
    won = live([TAKE, STOVE, EAT], tokenizer=tokenizer)
    lost = live([TAKE, OVEN], tokenizer=tokenizer, is_success=False)

    without, built = weigh([clumsy, lost], tokenizer), weigh([clumsy, won, lost], tokenizer)

    assert without.rows == [] and without.counts["no_imitable_win"] == 1
    assert [row.chosen_trajectory_id for row in built.rows] == [won.trajectory.id]


def test_going_in_circles_is_a_failure_to_learn_from_and_is_cut_short(tokenizer):
    won = live([TAKE, STOVE, EAT], tokenizer=tokenizer)
    rambling = live([TAKE, *(("look", f"A kitchen, {n}.") for n in range(9))], tokenizer=tokenizer, is_success=False)

    (row,) = weigh([won, rambling], tokenizer, scope="remainder", max_extra_rounds=2).rows

    rejected = tokenizer.decode(row.rejected_ids)
    assert rejected.count(say("look")) == 4  # two for the winner's two further steps, and two extra rounds
    assert rejected.endswith(say("look") + "<|im_end|>")


def test_what_cannot_be_compared_is_counted_by_its_reason(tokenizer):
    won = live([TAKE, STOVE, EAT], tokenizer=tokenizer)
    elsewhere = live([TAKE, OVEN], tokenizer=tokenizer, is_success=False, text="Make another meal.")
    alone = live([TAKE, OVEN], tokenizer=tokenizer, is_success=False, task="2")

    built = weigh([won, elsewhere, alone], tokenizer)

    assert not built.rows
    assert built.counts["prompts_differ"] == 1
    assert built.counts["no_contrast"] == 1


def test_an_episode_of_several_rows_is_one_example_of_its_task(tokenizer):
    short = drift(live([STOVE, EAT], tokenizer=tokenizer), 0, tokenizer)
    long = drift(live([TAKE, STOVE, EAT], tokenizer=tokenizer), 0, tokenizer)

    built = demonstrate([long, short], tokenizer, per_task=1)

    assert built.trajectory_ids == [short.trajectory.id]
    assert (len(built.rows), built.num_examples, built.counts["fork"]) == (2, 1, 2)
    assert built.trained_share == 1.0


def test_a_row_that_keeps_its_memory_by_mistake_is_left_out_alone_and_lowers_the_share(tokenizer):
    played = drift(live([STOVE, EAT], tokenizer=tokenizer, memory_text=MEMORY), 0, tokenizer)
    later = played.model_steps[1]
    later.prompt_token_ids = tokenizer("another prompt", add_special_tokens=False)["input_ids"]

    built = demonstrate([played], tokenizer)

    first = played.model_steps[0]
    assert own_text(built.rows[0].input_ids, built.rows[0].mask, tokenizer) == tokenizer.decode(first.output_token_ids)
    assert len(built.rows) == 1 and built.counts["rerender_mismatch"] == 1
    assert built.own_tokens - built.trained_tokens == len(later.output_token_ids)
    assert built.untrained == {"rerender_mismatch": len(later.output_token_ids)}


def test_a_preference_of_episodes_with_several_rows_parts_behind_the_prompt_of_that_step(tokenizer):
    won = drift(live([TAKE, STOVE, EAT], tokenizer=tokenizer, memory_text=MEMORY), 0, tokenizer)
    lost = drift(live([TAKE, OVEN, LOOK], tokenizer=tokenizer, is_success=False), 0, tokenizer)

    built = weigh([won, lost], tokenizer, scope="remainder")

    (row,) = built.rows
    assert built.counts["fork"] == 2
    assert row.prompt_ids == lost.model_steps[1].prompt_token_ids
    assert own_text(row.chosen_ids, row.chosen_mask, tokenizer) == "".join(
        say(command) + "<|im_end|>" for command in ("cook carrot with stove", "eat meal")
    )


def test_a_preference_ends_where_its_row_ends(tokenizer):
    won = drift(live([TAKE, STOVE, EAT], tokenizer=tokenizer), 1, tokenizer)
    lost = live([TAKE, OVEN], tokenizer=tokenizer, is_success=False)

    (row,) = weigh([won, lost], tokenizer).rows

    assert row.chosen_ids == won.model_steps[1].output_token_ids
    assert row.prompt_ids == won.model_steps[1].prompt_token_ids


def test_rows_survive_the_file(tokenizer, tmp_path):
    built = demonstrate([live([STOVE, EAT], tokenizer=tokenizer)], tokenizer)

    write_rows(built.rows, tmp_path / "rows.jsonl")

    (row,) = read_rows(tmp_path / "rows.jsonl")
    assert row["input_ids"] == built.rows[0].input_ids and row["mask"] == built.rows[0].mask
