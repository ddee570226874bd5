"""Anthropic's Messages API: `POST /v1/messages`, answered at once or as server-sent events, and the count of tokens.

    MessagesRequest -> ChatRequest -> TurnRequest -> Episode -> Turn -> Message

Invariant: an answer leaves only when everything in it is durable.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body, Request, Response
from fastapi.responses import StreamingResponse

from memory.schema import Trajectory, dump_json
from runtime.api.anthropic.messages_answer import Message, MessageWriter, TokenCount, complete
from runtime.api.anthropic.messages_request import EXAMPLES, MessagesRequest, TokenCountRequest, check_parameters
from runtime.api.errors import (
    AnthropicErrorAnswer,
    BadRequest,
    Conflict,
    EpisodeFailed,
    NotFound,
    NotReady,
    error_responses,
    request_id_header,
)
from runtime.api.gateway.permissions import RequestCaller
from runtime.api.health import require_ready
from runtime.api.openai.chat import make_chat_turn
from runtime.api.openai.chat_request import check_request
from runtime.api.openai.models import resolve
from runtime.api.openai.turns import StreamedTurn, finish, headers_for, limit_messages, write_events
from runtime.api.services import Server
from runtime.engine.process import NO_TOOLS

router = APIRouter(prefix="/v1/messages", tags=["messages"])


@router.post(
    "",
    summary="Ask the agent, in the words of Anthropic's API",
    response_model=Message,
    responses=error_responses(NotFound, Conflict, EpisodeFailed, NotReady, model=AnthropicErrorAnswer),
)
async def create_message(
    server: Server,
    caller: RequestCaller,
    request: Request,
    body: Annotated[MessagesRequest, Body(openapi_examples=EXAMPLES)],
) -> Response:
    """Anthropic's messages: text and tools that the client runs, at once or as events. The `id` is the target for
    feedback; `metadata.user_id` names the person whose memory is used.

    A reply with `tool_use` blocks keeps the trajectory open: send the same messages again, with the reply and its
    `tool_result` blocks behind them, and the episode goes on, with the same policy and the same memory.
    """
    limit_messages(server, len(body.messages), "messages")
    extensions = body.extensions()
    check_parameters(body)
    chat_request = body.as_chat_request()
    check_request(chat_request, extensions)
    turn_request = make_chat_turn(server, caller, extensions, chat_request)
    require_ready(server)
    if not body.stream:
        turn = await finish(request, server.agent, turn_request)
        text = dump_json(complete(turn).model_dump(mode="json"))
        return Response(text, media_type="application/json", headers=_headers_for(turn.trajectory))
    streamed = StreamedTurn(server.agent, turn_request)
    start = await streamed.wait_for_start(request)
    return StreamingResponse(
        write_events(streamed, MessageWriter(start)),
        media_type="text/event-stream",
        headers=_headers_for(start.trajectory),
    )


def _headers_for(trajectory: Trajectory) -> dict[str, str]:
    return headers_for(trajectory) | request_id_header(trajectory.id)


@router.post(
    "/count_tokens",
    summary="Count the tokens of a conversation",
    responses=error_responses(NotFound, NotReady, model=AnthropicErrorAnswer),
)
async def count_tokens(server: Server, body: TokenCountRequest) -> TokenCount:
    """The tokens of the messages and tools, rendered by the model's chat template. Memory that the server would show
    the model is not counted."""
    limit_messages(server, len(body.messages), "messages")
    check_parameters(body)
    if not body.messages:
        raise BadRequest("messages is empty: send at least one message", code="empty_messages")
    messages, tools = body.chat_messages(), body.chat_tools()
    if tools and not server.engine.takes_tools:
        raise BadRequest(NO_TOOLS, code="unsupported_parameter")
    resolve(body.model, server.memory.policies)
    require_ready(server)
    # Of the base: an adapter has the same tokenizer and chat template.
    client = server.engine.client
    return TokenCount(input_tokens=await client.count_tokens(client.model, messages, tools))
