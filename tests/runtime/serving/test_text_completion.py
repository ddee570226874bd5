"""Text of the base model, as JSON of a schema if the engine supports that."""

from __future__ import annotations

from typing import Any

import pytest

from memory.store import Memory
from runtime.errors import BudgetExceeded, EngineLost, RequestRefused
from runtime.serving.hotswap import HotSwap
from runtime.serving.text_completion import ServedBase, TextCompletion
from serve import ModelCritic
from tests.runtime.conftest import MakePolicy
from tests.runtime.fake_engine import FakeEngine, Reply

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
ASKED = [{"role": "user", "content": "What is a?"}]


async def ask(writer: TextCompletion) -> str:
    return await writer.complete(ASKED, schema=SCHEMA, max_tokens=7)


def refuse_schemas(status: int):
    def script(request: dict[str, Any]) -> Reply:
        if "response_format" in request:
            return Reply(status=status, error="response_format is not supported")
        return Reply("a is 1")

    return script


async def test_the_schema_reaches_the_engine_and_the_base_answers(
    fake: FakeEngine, hotswap: HotSwap, make_policy: MakePolicy
):
    policy = await make_policy()
    await hotswap.activate(policy.version)
    fake.script = lambda request: Reply('{"a": 1}')
    assert await ask(TextCompletion(ServedBase(hotswap))) == '{"a": 1}'
    (request,) = fake.requests
    assert (request["model"], request["max_tokens"]) == ("base", 7)
    assert request["response_format"]["type"] == "json_schema"
    assert request["response_format"]["json_schema"]["schema"] == SCHEMA


@pytest.mark.parametrize("status", [400, 422, 501])
async def test_an_engine_that_refuses_schemas_is_asked_with_one_once(fake: FakeEngine, hotswap: HotSwap, status: int):
    fake.script = refuse_schemas(status)
    writer = TextCompletion(ServedBase(hotswap))
    assert [await ask(writer) for _ in range(3)] == ["a is 1"] * 3
    assert ["response_format" in request for request in fake.requests] == [True, False, False, False]


async def test_a_refusal_of_the_messages_is_not_taken_for_one_of_the_schema(fake: FakeEngine, hotswap: HotSwap):
    fake.script = lambda request: Reply(status=400, error="the messages are wrong")
    writer = TextCompletion(ServedBase(hotswap))
    with pytest.raises(RequestRefused):
        await ask(writer)
    fake.script = lambda request: Reply("ok")
    await ask(writer)
    assert "response_format" in fake.requests[-1]


async def test_a_lost_engine_and_a_full_context_are_no_refusals(fake: FakeEngine, hotswap: HotSwap):
    for status, error, raised in (
        (500, "out of memory", EngineLost),
        (400, "This model's maximum context length is 16 tokens", BudgetExceeded),
    ):
        fake.requests.clear()
        fake.script = lambda request, status=status, error=error: Reply(status=status, error=error)
        with pytest.raises(raised):
            await ask(TextCompletion(ServedBase(hotswap)))
        assert len(fake.requests) == 1


@pytest.mark.parametrize("length", [4096, None])
async def test_the_engine_says_how_much_it_can_hold(fake: FakeEngine, hotswap: HotSwap, length: int | None):
    fake.max_model_len = length
    assert await TextCompletion(ServedBase(hotswap)).context_tokens() == length


async def test_what_the_engine_raises_becomes_what_the_seam_may_raise(
    fake: FakeEngine, hotswap: HotSwap, memory: Memory
):
    from optimizer.errors import CompletionError, PromptTooLong

    critic = ModelCritic(TextCompletion(ServedBase(hotswap)))
    fake.script = lambda request: Reply(status=500, error="out of memory")
    with pytest.raises(CompletionError, match=r"^the engine answered 500$"):  # its words can quote a prompt
        await critic.complete(ASKED, schema=SCHEMA, max_tokens=7)
    fake.script = lambda request: Reply(status=400, error="This model's maximum context length is 16 tokens")
    with pytest.raises(PromptTooLong):
        await critic.complete(ASKED, schema=SCHEMA, max_tokens=7)
