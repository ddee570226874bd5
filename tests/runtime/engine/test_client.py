"""Calls to the engine: every answer becomes a completion or a typed error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from aiohttp import web

from runtime.engine.client import Completion, Delta, EngineClient
from runtime.errors import BudgetExceeded, EngineLost, PolicyError

HI = [{"role": "user", "content": "hi"}]
Serve = Callable[..., "asyncio.Future[EngineClient]"]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """`await serve(handler)`: a client of a server that answers every chat request by `handler`."""
    cleanups = []

    async def start(handler) -> EngineClient:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", handler)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        client = EngineClient(f"http://127.0.0.1:{runner.addresses[0][1]}/v1", timeout_seconds=0.3)
        cleanups.extend([client.close, runner.cleanup])
        return client

    yield start
    for cleanup in cleanups:
        await cleanup()


def events(*datas: str):
    """A server that streams these events and stops."""

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for data in datas:
            await response.write(f"data: {data}\n\n".encode())
        return response

    return handler


async def listen(client: EngineClient) -> Completion:
    async def ignore(delta: Delta) -> None:
        pass

    return await client.chat_stream("base", HI, on_delta=ignore)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (500, "oops"),
        (429, '{"error": {"message": "too many"}}'),
        (200, "not json"),
        (200, '{"choices": []}'),
        (200, '{"choices": [{"message": null}]}'),
        (200, "[]"),
    ],
)
async def test_nonsense_and_refusals_are_policy_errors(serve: Serve, status: int, body: str):
    async def handler(request: web.Request) -> web.Response:
        return web.Response(status=status, text=body)

    client = await serve(handler)
    with pytest.raises(PolicyError) as caught:
        await client.chat("base", HI)
    assert caught.value.status == (status if status != 200 else None)


@pytest.mark.parametrize(
    "datas",
    [
        [],
        ["[DONE]"],
        ["{broken"],
        ["7"],
        ['{"error": {"message": "engine died"}}'],
        ['{"no": "choices"}'],
        ['{"choices": [{"delta": {"content": "half"}}]}'],
        ['{"choices": [{"delta": {"tool_calls": [7]}}]}'],
    ],
)
async def test_a_broken_stream_is_a_policy_error(serve: Serve, datas: list[str]):
    client = await serve(events(*datas))
    with pytest.raises(PolicyError):
        await listen(client)


async def test_a_full_context_is_a_budget(serve: Serve):
    async def handler(request: web.Request) -> web.Response:
        return web.json_response({"error": {"message": "the model's maximum context length is 9"}}, status=400)

    client = await serve(handler)
    for call in (client.chat("base", HI), listen(client)):
        with pytest.raises(BudgetExceeded, match="maximum context length is 9"):
            await call


async def test_silence_and_absence_are_policy_errors(serve: Serve):
    async def handler(request: web.Request) -> web.Response:
        await asyncio.sleep(3600)
        return web.Response()

    client = await serve(handler)
    with pytest.raises(PolicyError, match="silent"):
        await client.chat("base", HI)
    nobody = EngineClient("http://127.0.0.1:9")
    with pytest.raises(PolicyError, match="cannot be reached"):
        await nobody.chat("base", HI)
    assert not await nobody.probe()
    await nobody.close()


async def test_a_huge_event_and_split_characters_arrive_whole(serve: Serve):
    text = "ø" * 3_000_000

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        event = f'data: {{"choices": [{{"delta": {{"content": "{text}"}}, "finish_reason": "stop"}}]}}\n\n'.encode()
        await response.write(event[:101])
        await response.write(event[101:])
        await response.write(b"data: [DONE]\n\n")
        return response

    client = await serve(handler)
    assert (await listen(client)).content == text


async def test_calls_that_share_an_id_get_their_own(serve: Serve):
    async def handler(request: web.Request) -> web.Response:
        call = {"id": "same", "type": "function", "function": {"name": "look", "arguments": "{}"}}
        return web.json_response({"choices": [{"message": {"content": None, "tool_calls": [call, call]}}]})

    client = await serve(handler)
    calls = (await client.chat("base", HI)).tool_calls
    assert [call["id"] for call in calls] == ["same", "same-1"]


async def test_half_a_character_is_mended_before_anybody_sees_it(serve: Serve):
    call = {"id": "c1", "function": {"name": "say", "arguments": '{"text": "\ud83d"}'}}
    message = {"content": "half \udc00, whole \ud83d\ude00", "tool_calls": [call]}

    async def answer(request: web.Request) -> web.Response:
        return web.json_response({"choices": [{"message": message}]})

    reply = await (await serve(answer)).chat("base", HI)
    assert reply.content == "half \ufffd, whole \U0001f600"
    assert reply.tool_calls[0]["function"]["arguments"] == '{"text": "\ufffd"}'


async def test_a_call_after_the_client_was_closed_opens_no_connection():
    """A probe that starts while the engine is stopped would leave one behind."""
    client = EngineClient("http://127.0.0.1:9")
    await client.close()
    with pytest.raises(EngineLost, match="the client is closed"):
        await client.models()
    assert client._session is None
