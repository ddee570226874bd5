from __future__ import annotations

from dataclasses import replace

import pytest

from optimizer.data.stitching import (
    Unstitchable,
    align_logprobs,
    plan_memory_removal,
    remove_memory,
    render_prompt,
    stitch,
)
from tests.optimizer.worlds import ACT, live, say

MOVES = [("take carrot", "You have the carrot."), ("cook carrot with stove", "It is fried. You win!")]
MEMORY = "<memory>\nInsights:\n- fry the _ -> cook _ with stove\n</memory>"


def own_text(row, tokenizer) -> str:
    return tokenizer.decode([token for token, own in zip(row.input_ids, row.mask, strict=True) if own])


def test_calls_of_one_trajectory_become_one_row_whose_mask_is_the_agents_own_words(tokenizer):
    rows, tally = stitch(live(MOVES, tokenizer=tokenizer).steps)

    assert len(rows) == 1 and tally == {"clean": 1}
    assert own_text(rows[0], tokenizer) == "".join(say(command) + "<|im_end|>" for command, _ in MOVES)
    assert "You have the carrot." in tokenizer.decode(rows[0].input_ids)


def test_a_reply_that_was_rendered_back_differently_keeps_its_loss_and_the_next_call_begins_a_row(tokenizer):
    played = live(MOVES, tokenizer=tokenizer)
    drifted = say("take carrot").replace('": ', '":') + "<|im_end|>"
    played.steps[0].output_token_ids = tokenizer(drifted, add_special_tokens=False)["input_ids"]

    (first, second), tally = stitch(played.steps)

    assert tally == {"fork": 1}
    assert own_text(first, tokenizer) == drifted
    assert own_text(second, tokenizer) == say("cook carrot with stove") + "<|im_end|>"
    assert second.input_ids[: second.num_prompt_tokens] == played.steps[2].prompt_token_ids
    assert (first.first_step, second.first_step) == (0, 1)


def test_a_prompt_that_parts_before_the_last_reply_starts_a_new_row(tokenizer):
    played = live(MOVES, tokenizer=tokenizer)
    played.steps[2].prompt_token_ids = [7, *played.steps[2].prompt_token_ids]

    rows, tally = stitch(played.steps)

    assert tally == {"fork": 1} and len(rows) == 2
    assert rows[1].starts == [rows[1].num_prompt_tokens]


@pytest.mark.parametrize("is_forked", [False, True])
def test_log_probs_lie_at_the_tokens_that_were_sampled_with_them(tokenizer, is_forked):
    played = live(MOVES, tokenizer=tokenizer)
    if is_forked:
        played.steps[2].prompt_token_ids = [7, *played.steps[2].prompt_token_ids]
    for step in (played.steps[0], played.steps[2]):
        step.output_logprobs = [-float(token_id) for token_id in step.output_token_ids]

    rows, _ = stitch(played.steps)

    assert len(rows) == 1 + is_forked
    for row in rows:
        expected = [-token_id * own for token_id, own in zip(row.input_ids, row.mask, strict=True)]
        assert align_logprobs(row, played.steps) == expected
    played.steps[2].output_logprobs = None
    assert align_logprobs(rows[-1], played.steps) is None


def test_a_step_without_token_ids_is_refused_by_a_word(tokenizer):
    with pytest.raises(Unstitchable, match="no_token_ids"):
        stitch(live(MOVES).steps)


def test_without_its_memory_segment_a_row_reads_as_if_nothing_had_been_shown(tokenizer):
    shown, bare = (live(MOVES, tokenizer=tokenizer, memory_text=text) for text in (MEMORY, ""))
    (row,), _ = stitch(shown.steps)

    removed = remove_memory(row, plan_memory_removal(shown.trajectory, tokenizer))

    (expected,), _ = stitch(bare.steps)
    assert removed == expected
    assert "<memory>" in tokenizer.decode(row.input_ids)


def test_a_segment_that_does_not_render_as_it_was_captured_is_left_alone(tokenizer):
    shown = live(MOVES, tokenizer=tokenizer, memory_text=MEMORY)
    (row,), _ = stitch(shown.steps)
    shown.trajectory.memory_text = MEMORY.replace("stove", "oven")

    with pytest.raises(Unstitchable, match="rerender_mismatch"):
        remove_memory(row, plan_memory_removal(shown.trajectory, tokenizer))


def test_tool_definitions_render_in_the_order_the_engine_uses(tokenizer):
    shuffled = {"function": dict(reversed(ACT["function"].items())), "type": "function"}
    messages = [{"role": "user", "content": "hello"}]

    assert render_prompt(tokenizer, messages, [shuffled]) == render_prompt(tokenizer, messages, [ACT])


def test_the_memory_segment_is_taken_out_of_the_prompt_of_a_later_call(tokenizer):
    shown, bare = (live(MOVES, tokenizer=tokenizer, memory_text=text) for text in (MEMORY, ""))
    for played in (shown, bare):
        played.steps[0].output_token_ids = tokenizer("drifted<|im_end|>", add_special_tokens=False)["input_ids"]
    edits = plan_memory_removal(shown.trajectory, tokenizer)

    rows, _ = stitch(shown.steps)

    assert len(rows) == 2
    assert [remove_memory(row, edits) for row in rows] == stitch(bare.steps)[0]


def test_what_else_a_prompt_holds_stays_as_it_was_captured(tokenizer):
    """A template that writes today's date renders another one later."""
    shown = live(MOVES, tokenizer=tokenizer, memory_text=MEMORY)
    (row,), _ = stitch(shown.steps)
    dated = tokenizer("Today is 26 Jul 2024.", add_special_tokens=False)["input_ids"]
    captured = replace(row, input_ids=[*dated, *row.input_ids], num_prompt_tokens=len(dated) + row.num_prompt_tokens)

    removed = remove_memory(captured, plan_memory_removal(shown.trajectory, tokenizer))

    bare = live(MOVES, tokenizer=tokenizer)
    assert removed.input_ids == [*dated, *stitch(bare.steps)[0][0].input_ids]


def test_a_segment_that_stands_in_a_prompt_twice_is_left_alone(tokenizer):
    shown = live(MOVES, tokenizer=tokenizer, memory_text=MEMORY)
    (row,), _ = stitch(shown.steps)
    twice = replace(
        row,
        input_ids=row.input_ids[: row.num_prompt_tokens] + row.input_ids,
        num_prompt_tokens=2 * row.num_prompt_tokens,
    )

    with pytest.raises(Unstitchable, match="rerender_mismatch"):
        remove_memory(twice, plan_memory_removal(shown.trajectory, tokenizer))


def test_the_memory_segment_is_taken_out_of_a_message_of_parts(tokenizer):
    parts = [{"type": "text", "text": "Make a meal."}, {"type": "text", "text": "Quickly."}]
    shown, bare = (live(MOVES, tokenizer=tokenizer, text=parts, memory_text=text) for text in (MEMORY, ""))
    (row,), _ = stitch(shown.steps)

    removed = remove_memory(row, plan_memory_removal(shown.trajectory, tokenizer))

    assert "<memory>" in tokenizer.decode(row.input_ids)
    assert "<memory>" not in tokenizer.decode(removed.input_ids)
    assert removed.input_ids == stitch(bare.steps)[0][0].input_ids
