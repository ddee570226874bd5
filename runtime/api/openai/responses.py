"""OpenAI's Responses API: create a response, read it again, continue from it, delete it.

A response is the same rollout as a chat completion in another format:
check the request -> prepend the earlier conversation -> play -> store the response -> answer.
Invariants: an answer leaves only when everything in it is durable; deleting a response deletes the copy stored for its
client, never the trajectory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Query, Request, Response
from fastapi.openapi.models import Example
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from memory.errors import ConversationTooLong, UnknownResponse
from memory.schema import StoredResponse, dump_json
from memory.store import Memory
from runtime.agent.turn import TurnStart
from runtime.api.errors import (
    BadRequest,
    Conflict,
    EpisodeFailed,
    NotFound,
    NotReady,
    TooLarge,
    error_responses,
)
from runtime.api.gateway.permissions import RequestCaller
from runtime.api.health import require_ready
from runtime.api.openai.answer_ids import trajectory_of
from runtime.api.openai.chat_request import read_extensions
from runtime.api.openai.responses_answer import ResponseWriter, begin_response, end_response, list_output
from runtime.api.openai.responses_request import ResponseRequest, as_messages, check_conversation, check_request
from runtime.api.openai.turns import StreamedTurn, finish, headers_for, limit_messages, make_request, write_events
from runtime.api.read_answers import answer_from_thread
from runtime.api.services import Server, Services

router = APIRouter(prefix="/v1/responses", tags=["responses"])

Json = dict[str, Any]

EXAMPLES: dict[str, Example] = {
    "a question": {"summary": "Ask the active policy", "value": {"model": "agent", "input": "When is it due?"}},
    "going on": {
        "summary": "Bring the output of a function the answer called",
        "value": {
            "model": "agent",
            "previous_response_id": "resp_0199..._0",
            "input": [{"type": "function_call_output", "call_id": "call-1", "output": "May 2"}],
        },
    },
}


class DeletedResponse(BaseModel):
    """The id of a deleted response."""

    id: str
    object: str = "response"
    deleted: bool = True


class ItemList(BaseModel):
    """A page of the input items of one response."""

    object: str = "list"
    data: list[Json]
    first_id: str | None
    last_id: str | None
    has_more: bool


@router.post(
    "",
    summary="Ask the agent, in the words of the Responses API",
    responses=error_responses(NotFound, Conflict, EpisodeFailed, NotReady),
)
async def create_response(
    server: Server,
    caller: RequestCaller,
    request: Request,
    body: Annotated[ResponseRequest, Body(openapi_examples=EXAMPLES)],
) -> Response:
    """OpenAI's responses: text and function tools, at once or as events, stored unless `store` is false. The `id` is a
    target for feedback. `previous_response_id` goes on from a stored response; where that one called functions, the
    outputs in `input` go on with its very trajectory, which keeps its instructions if none are sent.
    """
    limit_messages(server, len(body.input) if isinstance(body.input, list) else 1, "input")
    extensions = read_extensions(body.metadata, safety_identifier=body.safety_identifier, user=body.user)
    check_request(body, extensions)
    items = body.items()
    history, instructions = [], body.instructions
    if body.previous_response_id is not None:
        history, instructions = await asyncio.to_thread(
            read_history, server, body.previous_response_id, caller.tenant, instructions
        )
    messages = as_messages([*history, *items])
    limit_messages(server, len(messages), "input")
    # Before the instructions are put in front: `param` counts the client's own items.
    check_conversation(messages)
    if instructions:
        messages.insert(0, {"role": "system", "content": instructions})
    turn_request = make_request(
        server,
        caller,
        extensions,
        model=body.model,
        messages=messages,
        temperature=body.temperature,
        max_tokens=body.max_output_tokens,
        tools=body.chat_tools(),
        sampling=body.sampling(),
        field_of_max_tokens="max_output_tokens",
    )
    require_ready(server)
    store = ResponseStore(server.memory, body, items, caller.tenant)
    if not body.stream:
        turn = await finish(request, server.agent, turn_request)
        begun = begin_response(body, TurnStart(turn.trajectory, turn.first_position), instructions)
        response = end_response(begun, turn, list_output(turn), server.engine.max_model_len)
        await store(response)
        return _send(response, headers_for(turn.trajectory))
    streamed = StreamedTurn(server.agent, turn_request)
    start = await streamed.wait_for_start(request)
    writer = ResponseWriter(begin_response(body, start, instructions), store, server.engine.max_model_len)
    return StreamingResponse(
        write_events(streamed, writer), media_type="text/event-stream", headers=headers_for(start.trajectory)
    )


def read_history(
    server: Services, response_id: str, tenant: str, instructions: str | None
) -> tuple[list[Json], str | None]:
    """Return the items up to and with a response, and the instructions for the request that continues from it.

    Raises:
        NotFound: a response on the way was never stored, or was deleted.
        TooLarge: they are longer together than a body may be.
    """
    limits = server.limits
    bounds = {"max_responses": limits.max_messages, "max_chars": limits.max_body_bytes}
    try:
        chain = server.memory.responses.conversation(response_id, tenant=tenant, **bounds)
    except ConversationTooLong as problem:
        raise TooLarge(str(problem), param="previous_response_id", code="conversation_too_large") from problem
    except UnknownResponse as problem:
        raise NotFound(str(problem), param="previous_response_id", code="previous_response_not_found") from problem
    # Deleting one response of the chain ends it: nothing behind it can be continued.
    items = [item for each in chain for item in (*each.input, *each.body["output"])]
    waits = any(item["type"] == "function_call" for item in chain[-1].body["output"])
    # A departure from OpenAI, where instructions hold for one request: a client that sends them once would split its
    # episode.
    if instructions is None and waits:  # the same episode continues, so its instructions do
        return items, chain[-1].body["instructions"]
    return items, instructions


class ResponseStore:
    """Stores the response to one request, unless the request sets `store` to false."""

    def __init__(self, memory: Memory, body: ResponseRequest, items: list[Json], tenant: str) -> None:
        self._memory = memory
        self._body = body
        self._items = items
        self._tenant = tenant

    async def __call__(self, response: Json) -> None:
        """Store it; durable when it returns."""
        if self._body.store is False:
            return
        row = StoredResponse(
            id=response["id"],
            tenant=self._tenant,
            trajectory_id=trajectory_of(response["id"]),
            previous_id=self._body.previous_response_id,
            input=self._items,
            body=response,
        )
        # After the turn, in a transaction of its own: a crash in between loses the response, never the trajectory.
        await self._memory.responses.save(row)


@router.get("/{response_id}", summary="Read a stored response", responses=error_responses(NotFound))
async def get_response(
    response_id: str,
    server: Server,
    caller: RequestCaller,
    stream: Annotated[bool, Query(description="Not supported: a stored response is read at once.")] = False,
) -> Response:
    if stream:
        raise BadRequest("stream=True is not supported here", param="stream", code="unsupported_parameter")
    return await answer_from_thread(
        lambda: dump_json(server.memory.responses.get(response_id, tenant=caller.tenant).body)
    )


def _send(response: Json, headers: Mapping[str, str] | None = None) -> Response:
    # dump_json, because the body repeats text of clients, which may hold lone surrogates
    # that JSONResponse cannot encode.
    return Response(dump_json(response), media_type="application/json", headers=headers)


@router.delete("/{response_id}", summary="Forget a stored response", responses=error_responses(NotFound))
async def delete_response(response_id: str, server: Server, caller: RequestCaller) -> DeletedResponse:
    """Delete the copy stored for the client; the trajectory, its steps and its rewards stay."""
    await server.memory.responses.delete(response_id, tenant=caller.tenant)
    return DeletedResponse(id=response_id)


@router.get(
    "/{response_id}/input_items",
    summary="List the input items of a response",
    response_model=ItemList,
    responses=error_responses(NotFound),
)
async def list_input_items(
    response_id: str,
    server: Server,
    caller: RequestCaller,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
    after: Annotated[str | None, Query(description="`last_id` of the page before.")] = None,
) -> Response:
    def read() -> ItemList:
        response = server.memory.responses.get(response_id, tenant=caller.tenant)
        return _page_of_items(response, limit, order, after)

    return await answer_from_thread(read)


def _page_of_items(response: StoredResponse, limit: int, order: str, after: str | None) -> ItemList:
    """Return a page of the input items of a response. Raises: NotFound for an unknown `after`."""
    items = response.input
    if order == "desc":
        items = items[::-1]
    if after is not None:
        positions = [position for position, item in enumerate(items) if item["id"] == after]
        if not positions:
            raise NotFound(f"response {response.id!r} has no input item {after!r}", param="after", code="not_found")
        items = items[positions[0] + 1 :]
    page = items[:limit]
    return ItemList(
        data=page,
        first_id=page[0]["id"] if page else None,
        last_id=page[-1]["id"] if page else None,
        has_more=len(items) > limit,
    )
