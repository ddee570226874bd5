"""OpenAI's embeddings, `POST /v1/embeddings`: vectors of texts by the encoder that searches memory.

Invariants: a text is never shortened unless the request asks for it; nothing of a request is stored.
Hazard: the encoder also encodes the query of each turn, which has a deadline: a request holds it for one small batch at
a time.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

import numpy
from fastapi import APIRouter, Body, Request, Response
from fastapi.openapi.models import Example
from pydantic import BaseModel, ConfigDict, Field, field_validator

from memory.schema import clean
from memory.search.encoder import Encoder, count_tokens, encode, max_chars, max_tokens, model_name
from runtime.api.errors import BadRequest, NotFound, NotReady, error_responses
from runtime.api.gateway.disconnects import cancel_on_disconnect
from runtime.api.gateway.permissions import RequestCaller
from runtime.api.openai.chat_request import refuse_unsupported
from runtime.api.services import Server, Services

router = APIRouter(prefix="/v1/embeddings", tags=["embeddings"])

MAX_INPUTS = 2048
"""Texts of one request, as in OpenAI's API."""
COUNT_BATCH = 128
ENCODE_BATCH = 8
"""Texts that are encoded before another request, or the query of a turn, has its turn. 32 long ones took longer than
`memory.encoding_deadline_seconds` on one core."""


class EmbeddingRequest(BaseModel):
    """A request for vectors. `user` has no effect: nothing of the request is kept."""

    model_config = ConfigDict(extra="allow")

    model: str = Field(examples=["all-MiniLM-L6-v2"])
    input: str | list[str]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(default=None, ge=1, description="Only the encoder's own number.")
    user: str | None = None
    truncate_prompt_tokens: Literal[-1] | None = Field(
        default=None, description="vLLM's parameter: -1 shortens texts to what the encoder reads, instead of an error."
    )

    @field_validator("input", mode="before")
    @classmethod
    def _require_texts(cls, given: object) -> object:
        if isinstance(given, str) or (isinstance(given, list) and all(isinstance(each, str) for each in given)):
            return given
        raise ValueError(
            "send a text or a list of texts; arrays of tokens are not supported, because they are another tokenizer's "
            "(LangChain sends texts with OpenAIEmbeddings(check_embedding_ctx_length=False))"
        )

    def texts(self) -> list[str]:
        """Return the texts. Raises: BadRequest for no text, an empty one, and too many."""
        texts = [self.input] if isinstance(self.input, str) else self.input
        if not texts or len(texts) > MAX_INPUTS:
            raise BadRequest(
                f"input has {len(texts)} texts: send 1 to {MAX_INPUTS}", param="input", code="invalid_value"
            )
        empty = next((position for position, text in enumerate(texts) if not text.strip()), None)
        if empty is not None:
            raise BadRequest(f"input[{empty}] is empty: leave it out", param="input", code="invalid_value")
        return [clean(text) for text in texts]


class Embedding(BaseModel):
    """The vector of one text, of unit length; with `base64`, its float32 numbers, little-endian."""

    object: str = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Tokens by the encoder's tokenizer."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    """The vectors in the order of the texts."""

    object: str = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


EXAMPLES: dict[str, Example] = {
    "two texts": {"summary": "Two texts", "value": {"model": "all-MiniLM-L6-v2", "input": ["rain", "sunshine"]}}
}


@router.post("", summary="Embed texts", response_model=EmbeddingList, responses=error_responses(NotFound, NotReady))
async def create_embeddings(
    server: Server,
    caller: RequestCaller,
    request: Request,
    body: Annotated[EmbeddingRequest, Body(openapi_examples=EXAMPLES)],
) -> Response:
    """Vectors of unit length by the encoder with which this server searches memory. `model` is the encoder's name, so
    that vectors of two encoders never mix. A text with more tokens than the encoder reads is rejected, unless
    `truncate_prompt_tokens` is -1.
    """
    refuse_unsupported(body.model_extra or {}, (), {})
    name = model_name(server.memory.encoder)
    if body.model != name:
        raise NotFound(
            f"the embedding model {body.model!r} does not exist; there is: {name!r}",
            param="model",
            code="model_not_found",
        )
    texts = body.texts()
    # Nothing may await between these two, or two requests take the same slot.
    server.embeddings.require(caller.tenant)
    with server.embeddings.occupy(caller.tenant):
        items, num_tokens = await cancel_on_disconnect(request, embed(server, body, texts, caller.quota.spend_tokens))
    usage = EmbeddingUsage(prompt_tokens=num_tokens, total_tokens=num_tokens)
    head = f'{{"object":"list","model":{json.dumps(name)},"usage":{usage.model_dump_json()},"data":['
    return Response(head + ",".join(items) + "]}", media_type="application/json")


async def embed(
    server: Services, body: EmbeddingRequest, texts: Sequence[str], on_usage: Callable[[int], None]
) -> tuple[list[str], int]:
    """Return each text's `Embedding` as JSON, and the tokens that the encoder read of all together.

    `on_usage` is called with the tokens before the first text is encoded: a client that leaves is charged, too.

    Raises:
        BadRequest: a text is longer than the encoder reads, or `dimensions` is not its number.
        IndexUnavailable: the encoder cannot be loaded, or fails.
    """
    encoder = server.memory.encoder
    num_tokens = 0
    # All are counted before the first is encoded, so that a request is rejected before it costs anything.
    for start, batch in _batches(texts, COUNT_BATCH):
        async with server.encoder_lock:
            num_tokens += await asyncio.to_thread(_measure, encoder, batch, start, body.truncate_prompt_tokens)
    on_usage(num_tokens)
    items: list[str] = []
    for start, batch in _batches(texts, ENCODE_BATCH):
        async with server.encoder_lock:
            items += await asyncio.to_thread(_encode, encoder, batch, start, body)
    return items, num_tokens


def _batches(texts: Sequence[str], size: int) -> Iterator[tuple[int, Sequence[str]]]:
    for start in range(0, len(texts), size):
        yield start, texts[start : start + size]


def _measure(encoder: Encoder, texts: Sequence[str], start: int, truncation: int | None) -> int:
    """Return the tokens that the encoder will read of the texts, the first of which is `input[start]`."""
    limit, num_chars = max_tokens(encoder), max_chars(encoder)
    counts = count_tokens(encoder, [text[: num_chars + 1] for text in texts])
    for position, (text, count) in enumerate(zip(texts, counts, strict=True), start):
        if truncation is None and (count > limit or len(text) > num_chars):
            size = f"{count} tokens" if len(text) <= num_chars else f"{len(text)} characters"
            raise BadRequest(
                f"input[{position}] has {size}, and the encoder reads {limit} tokens: split it, or send "
                "truncate_prompt_tokens=-1 to have it shortened",
                param="input",
                code="context_length_exceeded",
            )
    return sum(min(count, limit) for count in counts)


def _encode(encoder: Encoder, texts: Sequence[str], start: int, body: EmbeddingRequest) -> list[str]:
    """Return each vector as JSON; in small pieces, because writing JSON holds the interpreter's lock."""
    num_chars = max_chars(encoder)
    vectors = encode(encoder, [text[:num_chars] for text in texts])
    if body.dimensions not in (None, vectors.shape[1]):
        raise BadRequest(
            f"the vectors have {vectors.shape[1]} dimensions, and cannot be made {body.dimensions}: leave it out",
            param="dimensions",
            code="invalid_value",
        )
    return [_write(vector, position, body.encoding_format) for position, vector in enumerate(vectors, start)]


def _write(vector: numpy.ndarray, position: int, encoding_format: str) -> str:
    numbers = vector.astype("<f4")
    embedding: Any = numbers.tolist()
    if encoding_format == "base64":
        embedding = base64.b64encode(numbers.tobytes()).decode()
    return Embedding(index=position, embedding=embedding).model_dump_json()
