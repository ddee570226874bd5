"""Routes for imported examples: add, list, count, read and delete rows of training data.

A body is one row per line, in a format that other tools use. Adding a row again changes nothing, so a request that
broke off is repeated as a whole.
Invariant: every route reads the examples of the caller's tenant only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, Field

from memory.datasets.examples import AddedExamples, Origin
from memory.formats.content import BadRow, ExampleContent, ExampleKind
from memory.formats.files import parse_line
from memory.formats.registry import AUTO, FORMATS, find_format, recognise_row
from memory.schema import Example, Trust
from runtime.api.errors import BadRequest, NotFound, TooLarge, error_responses
from runtime.api.gateway.permissions import RequestCaller
from runtime.api.read_answers import answer_from_thread
from runtime.api.services import Server

router = APIRouter(prefix="/v1/examples", tags=["examples"])

MAX_REPORTED_ERRORS = 100
NDJSON = "application/x-ndjson"
ROWS_BODY = {
    "requestBody": {
        "required": True,
        "content": {NDJSON: {"schema": {"type": "string"}, "example": '{"messages": [...]}\n{"messages": [...]}\n'}},
    }
}


class InvalidRow(BaseModel):
    """A line that is no row of the format."""

    line: int
    message: str


class ImportedRows(BaseModel):
    """The fate of the rows of one request."""

    object: str = "examples.import"
    format: str | None = Field(description="The format of the rows; null where there was none.")
    num_rows: int
    num_added: int
    num_known: int = Field(description="Rows that the tenant has already.")
    num_raised: int = Field(description="Known rows that weights may learn from only since this import.")
    teaches: bool = Field(description="Whether weights may learn from rows of this request's key.")
    num_invalid: int
    errors: list[InvalidRow] = Field(description=f"The first {MAX_REPORTED_ERRORS} invalid lines.")


class ExampleSummary(BaseModel):
    """An example without its messages."""

    id: str
    kind: ExampleKind
    environment: str
    task: str | None
    source: str
    format: str
    is_good: bool | None
    reward: float | None
    trust: Trust
    key_id: str | None
    num_messages: int
    created_at: datetime


class ExampleDetail(ExampleSummary):
    """An example with its messages."""

    digest: str
    prompt: list[dict[str, object]]
    completion: list[dict[str, object]]
    rejected: list[dict[str, object]]
    tools: list[dict[str, object]]
    extra: dict[str, object]


class ExamplePage(BaseModel):
    """Newest first; `next_before` is the `before` of the next page."""

    object: str = "list"
    data: list[ExampleSummary]
    next_before: str | None


class ExampleCount(BaseModel):
    """The number of examples of one kind, environment and source."""

    kind: ExampleKind
    environment: str
    source: str
    num_examples: int


class ExampleCounts(BaseModel):
    """All examples, counted."""

    object: str = "list"
    data: list[ExampleCount]


class DeletedExamples(BaseModel):
    """The confirmation of a deletion."""

    object: str = "examples.deleted"
    num_deleted: int


@dataclass
class _ParsedRows:
    """The rows of a body, and its invalid lines."""

    format: str | None = None
    contents: list[ExampleContent] = field(default_factory=list)
    errors: list[InvalidRow] = field(default_factory=list)


@router.post("", summary="Add rows of training data", openapi_extra=ROWS_BODY, responses=error_responses(TooLarge))
async def add_examples(
    request: Request,
    server: Server,
    caller: RequestCaller,
    format: Annotated[str, Query(description=f"auto, or one of {', '.join(FORMATS)}.")] = AUTO,
    environment: Annotated[
        str, Query(description="Cycles of this environment learn from the rows; by default those of live traffic.")
    ] = "",
    source: Annotated[str, Query(max_length=500, description="A name for these rows, such as the file's.")] = "",
    on_error: Annotated[
        Literal["stop", "skip"], Query(description="stop: an invalid line rejects the request, and nothing is added.")
    ] = "stop",
    is_trusted: Annotated[bool, Query(description="false: kept and exported, never learned from.")] = True,
) -> ImportedRows:
    """One JSON object per line. Weights learn from the rows if the request's key may teach."""
    if environment:
        server.environment(environment)  # an unknown name would never be learned from
    body = await request.body()
    try:
        # a thread: a body of megabytes takes a second to parse
        parsed = await asyncio.to_thread(_parse_rows, body, format)
    except ValueError as error:  # no format of that name
        raise BadRequest(str(error), param="format", code="invalid_value") from None
    if parsed.errors and on_error == "stop":
        first = parsed.errors[0]
        raise BadRequest(
            f"line {first.line}: {first.message}. Nothing was added ({len(parsed.errors)} invalid lines)",
            code="invalid_row",
            line=str(first.line),
        )
    origin = Origin(
        tenant=caller.tenant,
        key_id=caller.key_id,
        trust=Trust.TRUSTED if is_trusted else Trust.UNTRUSTED,
        environment=environment,
        source=source,
        format=parsed.format or "",
    )
    added = AddedExamples(0, 0)
    if parsed.contents:
        added = await server.memory.examples.add(parsed.contents, origin)
    return ImportedRows(
        format=parsed.format,
        num_rows=len(parsed.contents) + len(parsed.errors),
        **vars(added),
        num_invalid=len(parsed.errors),
        errors=parsed.errors[:MAX_REPORTED_ERRORS],
    )


def _parse_rows(body: bytes, name: str) -> _ParsedRows:
    """Return the rows of a body; the format of the first valid one is that of all. Raises: ValueError."""
    chosen = None if name == AUTO else find_format(name)
    parsed = _ParsedRows(name if chosen else None)
    for number, line in _number_lines(body):
        try:
            row = parse_line(line)
            if chosen is None:
                chosen, _ = recognise_row(row)
                parsed.format = chosen.name
            parsed.contents.append(chosen.read(row))
        except BadRow as error:
            parsed.errors.append(InvalidRow(line=number, message=str(error)))
    return parsed


def _number_lines(body: bytes) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(body.split(b"\n"), start=1):
        if line.strip():
            yield number, line


@router.get("", summary="List examples, newest first", response_model=ExamplePage)
async def list_examples(
    server: Server,
    caller: RequestCaller,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
    before: Annotated[str | None, Query(description="`next_before` of the previous page.")] = None,
    kind: ExampleKind | None = None,
    environment: str | None = None,
    source: str | None = None,
) -> Response:
    def read() -> ExamplePage:
        rows = server.memory.examples.select(
            limit=limit, before_id=before, kind=kind, environment=environment, source=source, tenant=caller.tenant
        )
        data = [ExampleSummary(**_summarise(row)) for row in rows]
        return ExamplePage(data=data, next_before=data[-1].id if len(data) == limit else None)

    return await answer_from_thread(read)


@router.get("/counts", summary="Count examples by kind, environment and source")
async def count_examples(server: Server, caller: RequestCaller) -> ExampleCounts:
    counts = await asyncio.to_thread(server.memory.examples.count, tenant=caller.tenant)
    return ExampleCounts(
        data=[
            ExampleCount(kind=kind, environment=environment, source=source, num_examples=number)
            for kind, environment, source, number in counts
        ]
    )


@router.get(
    "/{example_id}", summary="Read an example", response_model=ExampleDetail, responses=error_responses(NotFound)
)
async def get_example(example_id: str, server: Server, caller: RequestCaller) -> Response:
    def read() -> ExampleDetail:
        row = server.memory.examples.get(example_id, tenant=caller.tenant)
        fields = {name: getattr(row, name) for name in ExampleDetail.model_fields.keys() - ExampleSummary.model_fields}
        return ExampleDetail(**_summarise(row), **fields)

    return await answer_from_thread(read)


@router.delete("/{example_id}", summary="Delete an example", responses=error_responses(NotFound))
async def delete_example(example_id: str, server: Server, caller: RequestCaller) -> DeletedExamples:
    """Adapters that were trained on it keep what they learned."""
    await server.memory.examples.delete(example_id, tenant=caller.tenant)
    return DeletedExamples(num_deleted=1)


@router.delete("", summary="Delete all examples of a source")
async def delete_source(
    server: Server, caller: RequestCaller, source: Annotated[str, Query(description="The name given at the import.")]
) -> DeletedExamples:
    """Adapters that were trained on them keep what they learned."""
    return DeletedExamples(num_deleted=await server.memory.examples.delete_source(source, tenant=caller.tenant))


def _summarise(row: Example) -> dict[str, Any]:
    fields = {name: getattr(row, name) for name in ExampleSummary.model_fields.keys() - {"num_messages"}}
    return {**fields, "num_messages": len(row.prompt) + len(row.completion) + len(row.rejected)}
