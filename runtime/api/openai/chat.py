"""OpenAI's chat completions: `POST /v1/chat/completions`, answered at once or as server-sent events.

    ChatRequest -> TurnRequest -> Episode -> Turn -> ChatCompletion

Invariant: an answer leaves only when everything in it is durable.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from runtime.agent.turn import TurnRequest
from runtime.api.errors import (
    Conflict,
    EpisodeFailed,
    NotFound,
    NotReady,
    error_responses,
)
from runtime.api.gateway.permissions import Caller, RequestCaller
from runtime.api.health import require_ready
from runtime.api.openai.chat_answer import ChatCompletion, ChunkWriter, complete
from runtime.api.openai.chat_request import EXAMPLES, ChatRequest, Extensions, check_request, read_extensions
from runtime.api.openai.turns import StreamedTurn, finish, headers_for, limit_messages, make_request, write_events
from runtime.api.services import Server, Services

router = APIRouter(prefix="/v1/chat", tags=["chat"])


@router.post(
    "/completions",
    summary="Ask the agent, or have it play a task",
    response_model=ChatCompletion,
    responses=error_responses(NotFound, Conflict, EpisodeFailed, NotReady),
)
async def create_completion(
    server: Server,
    caller: RequestCaller,
    request: Request,
    body: Annotated[ChatRequest, Body(openapi_examples=EXAMPLES)],
) -> Response:
    """OpenAI's chat completions, with the agent behind the model's name. The answer's `id` is the target for feedback,
    and leads to the trajectory that the header `X-Trajectory-Id` names; `X-Policy` says who acted; the object
    `ratchet`, what became of it.

    A reply that calls `tools` of the request keeps the trajectory open: send the same messages again, with the reply
    and the results of its calls behind them, and the episode goes on, with the same policy and the same memory.

    An episode that fails answers 502: `code` is the class of the error, `trajectory_id` leads to everything recorded.
    """
    # First: all that follows takes time for each message.
    limit_messages(server, len(body.messages), "messages")
    extensions = read_extensions(body.metadata, safety_identifier=body.safety_identifier, user=body.user)
    check_request(body, extensions)
    turn_request = make_chat_turn(server, caller, extensions, body)
    # After the checks, so that an invalid request is a 400 also while the engine starts.
    require_ready(server)
    if not body.stream:
        turn = await finish(request, server.agent, turn_request)
        answer = complete(turn, with_logprobs=bool(body.logprobs))
        return JSONResponse(answer.model_dump(mode="json"), headers=headers_for(turn.trajectory))
    streamed = StreamedTurn(server.agent, turn_request)
    start = await streamed.wait_for_start(request)
    writer = ChunkWriter(start, include_usage=bool(body.stream_options and body.stream_options.include_usage))
    return StreamingResponse(
        write_events(streamed, writer), media_type="text/event-stream", headers=headers_for(start.trajectory)
    )


def make_chat_turn(server: Services, caller: Caller, extensions: Extensions, body: ChatRequest) -> TurnRequest:
    """Return the request to the agent. Raises as `make_request` does."""
    return make_request(
        server,
        caller,
        extensions,
        model=body.model,
        messages=[message.plain() for message in body.messages],
        temperature=body.temperature,
        seed=body.seed,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        field_of_max_tokens="max_completion_tokens" if body.max_completion_tokens else "max_tokens",
        tools=body.tools or (),
        sampling=body.sampling(),
    )
