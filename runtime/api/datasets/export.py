"""The route that exports episodes and examples as a stream of rows.

Hazard: the status has been sent when a later page fails. The connection then breaks off, so a stream with cursors ends
with a line that says that it is whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query
from fastapi.responses import StreamingResponse

from memory.datasets.exports import KINDS, ExportContent, ExportedRow, ExportQuery, Exports
from memory.formats.content import NotExpressible, Row
from memory.formats.files import dump_line
from memory.formats.registry import FORMATS, Format, find_format, require_holds, write_row
from runtime.api.datasets.examples import NDJSON
from runtime.api.errors import OK, BadRequest, NotFound, error_responses
from runtime.api.gateway.permissions import RequestCaller
from runtime.api.services import Server

router = APIRouter(prefix="/v1/export", tags=["examples"])

STREAMED: dict[int | str, dict[str, Any]] = {
    OK: {"content": {NDJSON: {"schema": {"type": "string"}}}, "description": "One row per line."}
}


@router.get(
    "/{content}",
    summary="Export episodes and examples",
    response_class=StreamingResponse,
    responses={**STREAMED, **error_responses(NotFound)},
)
async def export_rows(
    content: Annotated[str, Path(description=f"One of {', '.join(ExportContent)}.")],
    server: Server,
    caller: RequestCaller,
    format: Annotated[str, Query(description=f"One of {', '.join(FORMATS)}.")] = "trl",
    environment: Annotated[str | None, Query(description="Only of this one; empty for live traffic.")] = None,
    episodes: Annotated[bool, Query(description="Include recorded episodes.")] = True,
    imported: Annotated[bool, Query(description="Include imported examples.")] = True,
    after: Annotated[str, Query(description="A cursor: go on behind it.")] = "",
    cursors: Annotated[
        bool,
        Query(description="Lines of {cursor, rows, left_out} between one with the total and one with counts."),
    ] = False,
) -> StreamingResponse:
    """Oldest first; the memory of one page, however many rows. Rows that the format cannot hold are left out."""
    exports = server.memory.exports
    if content not in set(ExportContent):
        raise NotFound(f"there is no export {content[:80]!r}: use one of {', '.join(ExportContent)}", param="content")
    query = ExportQuery(
        ExportContent(content), caller.tenant, environment, with_episodes=episodes, with_examples=imported
    )
    try:
        target = find_format(format)
        require_holds(target, KINDS[query.content])
    except ValueError as error:
        raise BadRequest(str(error), param="format", code="invalid_value") from None
    if after.partition("_")[0] not in ("", "trj", "exm"):
        raise BadRequest(f"there is no cursor {after[:80]!r}: pass one that an export returned", param="after")
    if cursors:
        lines = _stream_with_cursors(exports, query, target, after)
    else:
        lines = stream_rows(exports, query, target, after, Counter())
    # a plain generator: Starlette runs each page in a thread
    return StreamingResponse(lines, media_type=NDJSON)


def stream_rows(
    exports: Exports, query: ExportQuery, target: Format, after: str, left_out: Counter[str]
) -> Iterator[bytes]:
    """Yield the lines of each page. Rows that the format cannot hold are counted in `left_out`, by reason."""
    for page in exports.read(query, after=after):
        rows = [row for exported in page for row in _write_rows(exported, target, left_out)]
        yield b"".join(dump_line(row) for row in rows)


def _stream_with_cursors(exports: Exports, query: ExportQuery, target: Format, after: str) -> Iterator[bytes]:
    yield dump_line({"total": exports.count(query, after=after)})
    left_out: Counter[str] = Counter()
    num_rows = 0
    for page in exports.read(query, after=after):
        lines = []
        for exported in page:
            left_out_here: Counter[str] = Counter()
            rows = _write_rows(exported, target, left_out_here)
            lines.append({"cursor": exported.cursor, "rows": rows, "left_out": left_out_here})
            num_rows += len(rows)
            left_out += left_out_here
        yield b"".join(map(dump_line, lines))
    yield dump_line({"done": True, "num_rows": num_rows, "left_out": dict(left_out)})


def _write_rows(exported: ExportedRow, target: Format, left_out: Counter[str]) -> list[Row]:
    rows = []
    for content in exported.contents:
        try:
            rows.append(write_row(content, target, source=exported.format))
        except NotExpressible as reason:
            left_out[str(reason)] += 1
    return rows
