"""Whose words a prompt may hold: one person's are shown to that person alone."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.api.worlds import ServedWorld

SECRET = "My name is Jane Doe, my IBAN is DE89370400440532013000: confirm my refund."
HAIKU = "Write a haiku."


def ask(http: httpx.Client, text: str, **fields: Any) -> str:
    """Ask the agent; return the answer's id."""
    body = {"model": "agent", "messages": [{"role": "user", "content": text}], **fields}
    return http.post("/v1/chat/completions", json=body).raise_for_status().json()["id"]


def like(http: httpx.Client, answer: str, **fields: Any) -> None:
    http.post("/v1/feedback", json={"target": answer, "value": True, **fields}).raise_for_status()


def drain(world: ServedWorld) -> None:
    """Wait until the index holds what the rows say."""
    import asyncio

    asyncio.run(world.memory.index.drain())


def prompt(world: ServedWorld, http: httpx.Client, text: str, **fields: Any) -> str:
    """Ask; return what the model was shown, without the question itself."""
    ask(http, text, **fields)
    (shown,) = [message["content"] for message in world.engine.calls[-1]["messages"] if message["role"] == "user"]
    return shown.removesuffix(text)


@pytest.mark.parametrize(
    ("jane", "others"),
    [
        ({"user": "jane"}, [{"user": "bob"}, {}]),
        ({"safety_identifier": "jane"}, [{"safety_identifier": "bob"}, {"user": "bob"}, {}]),
        ({"metadata": {"user": "jane"}}, [{"metadata": {"user": "bob"}}, {}]),
        ({}, [{"user": "bob"}, {}]),
    ],
)
def test_what_one_person_said_is_shown_to_nobody_else(
    world: ServedWorld, http: httpx.Client, jane: dict[str, Any], others: list[dict[str, Any]]
):
    like(http, ask(http, SECRET, **jane))
    drain(world)
    for other in others:
        for text in (HAIKU, SECRET):
            assert prompt(world, http, text, **other) == "", other
    assert ("IBAN" in prompt(world, http, SECRET, **jane)) == bool(jane)  # hers still, if it is known who she is
    assert prompt(world, http, HAIKU, **jane) == ""  # far from what is asked
