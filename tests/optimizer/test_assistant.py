"""The demonstrations of an assistant must be correct, because they are not graded."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from optimizer.pretraining.assistant import make_demonstrations


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return make_demonstrations(300, seed=3)


def calls(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [call for message in row["messages"] for call in message.get("tool_calls", ())]


def test_every_call_fits_the_definition_of_a_tool_that_was_offered(rows):
    for row in rows:
        offered = {tool["function"]["name"]: tool["function"]["parameters"] for tool in row.get("tools", ())}
        for call in calls(row):
            jsonschema.validate(json.loads(call["function"]["arguments"]), offered[call["function"]["name"]])
    assert sum(bool(calls(row)) for row in rows) > 100


def test_every_call_is_answered_once_and_the_last_word_is_the_assistants(rows):
    for row in rows:
        answered = [message["tool_call_id"] for message in row["messages"] if message["role"] == "tool"]
        assert answered == [call["id"] for call in calls(row)] and len(set(answered)) == len(answered)
        assert row["messages"][-1]["role"] == "assistant" and row["messages"][-1]["content"]


def test_nothing_is_left_unfilled_and_no_row_comes_twice(rows):
    texts = [json.dumps(row["messages"]) for row in rows]
    assert len(set(texts)) == len(texts)
    assert not any("{first}" in text or "{city}" in text or "{subject}" in text for text in texts)


def test_the_question_that_the_documentation_asks_is_not_among_them(rows):
    """Its answer would show only memorisation."""
    assert "France" not in json.dumps(rows)


def test_the_same_arguments_make_the_same_rows():
    assert make_demonstrations(40, seed=1) == make_demonstrations(40, seed=1) != make_demonstrations(40, seed=2)
