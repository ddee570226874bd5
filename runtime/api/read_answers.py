"""Answers that are read and written as JSON in a thread: many rows, or long ones, would hold up the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated

from fastapi import Query, Response
from pydantic import BaseModel

MAX_ROWS = 500
"""Of one page of a list."""

Limit = Annotated[int, Query(ge=1, le=MAX_ROWS)]
Offset = Annotated[int, Query(ge=0, lt=2**31, description="How many rows to skip.")]


async def answer_from_thread(read: Callable[[], BaseModel | str]) -> Response:
    """Return the answer that `read` returns, a model or JSON. Raises: as `read`."""

    def write() -> str:
        answer = read()
        return answer if isinstance(answer, str) else answer.model_dump_json()

    return Response(await asyncio.to_thread(write), media_type="application/json")


def next_offset(offset: int, num_rows: int, limit: int) -> int | None:
    """Return the offset of the page behind one of `num_rows` rows; None for the last page."""
    return offset + limit if num_rows == limit else None
