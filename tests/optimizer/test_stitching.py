from __future__ import annotations

import pytest

from optimizer.stitching import Unstitchable, remove_memory, render_prompt, stitch
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


def test_a_reply_that_was_rendered_back_differently_becomes_context_from_where_it_drifts(tokenizer):
    played = live(MOVES, tokenizer=tokenizer)
    drifted = say("take carrot").replace('": ', '":') + "<|im_end|>"
    played.steps[0].output_token_ids = tokenizer(drifted, add_special_tokens=False)["input_ids"]

    rows, tally = stitch(played.steps)

    assert tally == {"realign": 1} and len(rows) == 1
    own = own_text(rows[0], tokenizer)
    assert own == '<tool_call>\n{"name":' + say("cook carrot with stove") + "<|im_end|>"
    assert rows[0].input_ids[: rows[0].starts[1]] == played.steps[2].prompt_token_ids


def test_a_prompt_that_parts_before_the_last_reply_starts_a_new_row(tokenizer):
    played = live(MOVES, tokenizer=tokenizer)
    played.steps[2].prompt_token_ids = [7, *played.steps[2].prompt_token_ids]

    rows, tally = stitch(played.steps)

    assert tally == {"fork": 1} and len(rows) == 2
    assert rows[1].starts == [rows[1].num_prompt_tokens]


def test_a_step_without_token_ids_is_refused_by_a_word(tokenizer):
    with pytest.raises(Unstitchable, match="no_token_ids"):
        stitch(live(MOVES).steps)


def test_without_its_memory_segment_a_row_reads_as_if_nothing_had_been_shown(tokenizer):
    shown, bare = (live(MOVES, tokenizer=tokenizer, memory_text=text) for text in (MEMORY, ""))
    (row,), _ = stitch(shown.steps)

    removed = remove_memory(row, shown.trajectory, tokenizer)

    (expected,), _ = stitch(bare.steps)
    assert removed == expected
    assert "<memory>" in tokenizer.decode(row.input_ids)


def test_a_segment_that_does_not_render_as_it_was_captured_is_left_alone(tokenizer):
    shown = live(MOVES, tokenizer=tokenizer, memory_text=MEMORY)
    (row,), _ = stitch(shown.steps)
    shown.trajectory.memory_text = MEMORY.replace("stove", "oven")

    with pytest.raises(Unstitchable, match="rerender_mismatch"):
        remove_memory(row, shown.trajectory, tokenizer)


def test_tool_definitions_render_in_the_order_the_engine_uses(tokenizer):
    shuffled = {"function": dict(reversed(ACT["function"].items())), "type": "function"}
    messages = [{"role": "user", "content": "hello"}]

    assert render_prompt(tokenizer, messages, [shuffled]) == render_prompt(tokenizer, messages, [ACT])
