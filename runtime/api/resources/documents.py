"""Routes for documents: add, list, search, read and remove texts that the agent can search.

Invariant: every route reads the documents of the caller's tenant only.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Body, File, Form, Response, UploadFile
from fastapi.openapi.models import Example
from pydantic import BaseModel, Field

from memory.schema import Document, Trust
from memory.search.document_search import search_documents
from runtime.api.errors import CREATED, BadRequest, NotFound, TooLarge, error_responses
from runtime.api.gateway.permissions import Caller, RequestCaller
from runtime.api.read_answers import MAX_ROWS, Limit, Offset, answer_from_thread, next_offset
from runtime.api.services import Server, Services

router = APIRouter(prefix="/v1/documents", tags=["documents"])


class DocumentRequest(BaseModel, extra="forbid"):
    """A text with a title. Adding a title again replaces its text."""

    title: str = Field(min_length=1, max_length=500)
    text: str = Field(min_length=1, max_length=10_000_000)
    is_trusted: bool = Field(
        default=True,
        description="false for text of users: an episode that reads it is not learned from until it is approved.",
    )


class DocumentDetail(BaseModel):
    """A document, without its text."""

    id: str
    title: str
    digest: str
    created_at: datetime


class DocumentText(DocumentDetail):
    """A document with its text, split into passages."""

    passages: list[str]


class DocumentPage(BaseModel):
    """By title; `next_offset` is the `offset` of the next page."""

    object: str = "list"
    data: list[DocumentDetail]
    next_offset: int | None


class DocumentQuery(BaseModel, extra="forbid"):
    """A question and the maximum number of passages to return."""

    query: str = Field(min_length=1, max_length=10_000)
    limit: int = Field(default=5, ge=1, le=100)


class DocumentMatch(BaseModel):
    """A matching passage. `score` is comparable within this answer only."""

    document_id: str
    title: str
    text: str
    score: float


class DocumentMatches(BaseModel):
    """The matching passages, best first."""

    object: str = "list"
    data: list[DocumentMatch]


class DeletedDocument(BaseModel):
    """The confirmation of a deletion, like OpenAI's."""

    id: str
    object: str = "document.deleted"
    deleted: bool = True


EXAMPLE: dict[str, Example] = {
    "handbook": {"value": {"title": "Refunds", "text": "Refunds above 100 EUR need a second signature."}}
}


@router.post("", status_code=CREATED, summary="Give the agent a text to read", responses=error_responses(TooLarge))
async def add_document(
    server: Server, caller: RequestCaller, body: Annotated[DocumentRequest, Body(openapi_examples=EXAMPLE)]
) -> DocumentDetail:
    return await _ingest(server, caller, body.title, body.text, is_trusted=body.is_trusted)


@router.post(
    "/upload", status_code=CREATED, summary="Give the agent a text file to read", responses=error_responses(TooLarge)
)
async def upload_document(
    server: Server,
    caller: RequestCaller,
    file: Annotated[UploadFile, File(description="Text in UTF-8.")],
    title: Annotated[str, Form(max_length=500, description="By default the file's name.")] = "",
    is_trusted: Annotated[bool, Form()] = True,
) -> DocumentDetail:
    """The same as multipart/form-data: `curl -F file=@handbook.md`."""
    try:
        # The whole file at once: gateway/request_body.py has bounded the body.
        text = (await file.read()).decode("utf-8-sig")  # Windows' editors put a byte order mark in front
    except UnicodeDecodeError:
        raise BadRequest(
            f"{file.filename!r} ({file.content_type}) is not UTF-8 text: convert it to text first",
            param="file",
            code="invalid_value",
        ) from None
    title = title.strip() or (file.filename or "")[:500]
    return await _ingest(server, caller, title, text, is_trusted=is_trusted)


async def _ingest(server: Services, caller: Caller, title: str, text: str, *, is_trusted: bool) -> DocumentDetail:
    trust = Trust.TRUSTED if is_trusted else Trust.UNTRUSTED
    row = await server.memory.documents.ingest(title, text, tenant=caller.tenant, trust=trust)
    return describe_document(row)


@router.get("", summary="List documents", response_model=DocumentPage)
async def list_documents(
    server: Server, caller: RequestCaller, limit: Limit = MAX_ROWS, offset: Offset = 0
) -> Response:
    def read() -> DocumentPage:
        rows = server.memory.documents.select(tenant=caller.tenant, limit=limit, offset=offset)
        data = [describe_document(row) for row in rows]
        return DocumentPage(data=data, next_offset=next_offset(offset, len(data), limit))

    return await answer_from_thread(read)


@router.post("/search", summary="Find passages of documents")
async def search(server: Server, caller: RequestCaller, body: DocumentQuery) -> DocumentMatches:
    memory = server.memory
    matches = await search_documents(memory.database, memory.index, body.query, body.limit, tenant=caller.tenant)
    return DocumentMatches(data=[DocumentMatch.model_validate(match, from_attributes=True) for match in matches])


@router.get(
    "/{document_id}", summary="Read a document", response_model=DocumentText, responses=error_responses(NotFound)
)
async def get_document(document_id: str, server: Server, caller: RequestCaller) -> Response:
    documents = server.memory.documents

    def read() -> DocumentText:
        row = documents.get(document_id, tenant=caller.tenant)
        passages = [passage.text for passage in documents.passages(document_id, tenant=caller.tenant)]
        return DocumentText(**describe_document(row).model_dump(), passages=passages)

    return await answer_from_thread(read)


@router.delete("/{document_id}", summary="Remove a document", responses=error_responses(NotFound))
async def remove_document(document_id: str, server: Server, caller: RequestCaller) -> DeletedDocument:
    await server.memory.documents.remove(document_id, tenant=caller.tenant)
    return DeletedDocument(id=document_id)


def describe_document(row: Document) -> DocumentDetail:
    return DocumentDetail.model_validate(row, from_attributes=True)
