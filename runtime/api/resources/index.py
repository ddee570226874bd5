"""The route that rebuilds the search index from the rows, for instance after damage to its files."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel

from runtime.api.services import Server

router = APIRouter(prefix="/v1/index", tags=["index"])


class RebuiltIndex(BaseModel):
    """The number of entries in each collection."""

    counts: dict[str, int]


@router.post("/rebuild", summary="Rebuild the index from the rows")
async def rebuild_index(server: Server) -> RebuiltIndex:
    """Requests are answered meanwhile; the text index finds rows whose vectors are not rebuilt yet."""
    return RebuiltIndex(counts=await server.memory.index.rebuild())
