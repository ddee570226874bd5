"""The messages of an episode are built in one way for prompts and training."""

from __future__ import annotations

import pytest

from memory.conversation import as_reply, last_user_text, restore_messages, show_memory, show_plan
from memory.schema import Step, StepKind
from runtime.engine.client import Completion

CALL = {"id": "1", "type": "function", "function": {"name": "act", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("content", "shown"), [("I look.\n", "I look."), ("I look.\n\n", "I look.\n"), ("I look.", "I look."), ("", "")]
)
def test_the_newline_that_a_parser_leaves_before_a_call_is_shown_to_no_model(content, shown):
    step = Step(trajectory_id="t", position=0, kind=StepKind.MODEL, content=content, tool_calls=[CALL])
    expected = {"role": "assistant", "content": shown, "tool_calls": [CALL]}

    assert as_reply(content, [CALL]) == expected
    assert Completion(content=content, tool_calls=[CALL]).as_message() == expected
    assert restore_messages([step]) == [expected]


def test_a_reply_without_calls_is_shown_as_it_was_said():
    assert as_reply("Done.\n", []) == {"role": "assistant", "content": "Done.\n"}


def test_memory_is_shown_ahead_of_the_last_user_message_whatever_its_form():
    before = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    parts = [{"type": "text", "text": "Cook."}]

    assert show_memory([*before, {"role": "user", "content": "Cook."}], "M") == [
        *before,
        {"role": "user", "content": "M\n\nCook."},
    ]
    assert show_memory([{"role": "user", "content": parts}], "M") == [
        {"role": "user", "content": [{"type": "text", "text": "M\n\n"}, *parts]}
    ]
    assert show_memory(before[1:], "M") == before[1:]


def test_a_plan_and_memory_are_added_to_the_same_message_and_to_none_without_a_user():
    opening = [{"role": "user", "content": None}, {"role": "assistant", "content": "Hello."}]

    shown = show_memory(show_plan(opening, "Add."), "M")

    assert shown == [{"role": "user", "content": "M\n\n\n\nA plan, which may be wrong:\nAdd."}, opening[1]]
    assert show_memory(show_plan(opening[1:], "Add."), "M") == opening[1:]


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([{"role": "user", "content": "Hi."}, {"role": "user", "content": "Cook."}, {"role": "tool"}], "Cook."),
        ([{"role": "user", "content": [{"type": "text", "text": "Co"}, {"type": "text", "text": "ok."}]}], "Cook."),
        ([{"role": "user", "content": None}], ""),
        ([{"role": "assistant", "content": "Hello."}], ""),
    ],
)
def test_the_last_users_text_is_found_whatever_its_form(messages, text):
    assert last_user_text(messages) == text
