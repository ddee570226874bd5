"""What finds memories by meaning and by word: rebuilt here from the rows, after damage or for peace of mind."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel

from runtime.api.services import Server

router = APIRouter(prefix="/v1/index", tags=["index"])


class Rebuilt(BaseModel):
    """How many entries each collection holds now."""

    counts: dict[str, int]


@router.post("/rebuild", summary="Rebuild the index from the rows")
async def rebuild_index(server: Server) -> Rebuilt:
    """Answers go on meanwhile: words find what meanings cannot yet."""
    return Rebuilt(counts=await server.memory.index.rebuild())
