"""A fake of the part of a cycle that extracting insights needs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from memory.store import Memory
from optimizer.cycle.artifacts import CycleArtifacts
from optimizer.errors import CompletionError
from optimizer.rewards import grade


class OneCycle:
    """A pool, a critic and artifacts."""

    def __init__(self, memory: Memory, complete: Any, context: int | CompletionError = 4096) -> None:
        self.memory, self.config, self.artifacts = memory, SimpleNamespace(seed=0), CycleArtifacts()
        self.seams = SimpleNamespace(complete=complete, context_tokens=self._context_tokens)
        self._context = context

    async def _context_tokens(self) -> int:
        if isinstance(self._context, CompletionError):
            raise self._context
        return self._context

    async def read_pool(self, **_: bool):
        return grade(self.memory)

    async def save_artifacts(self, **artifacts: Any) -> None:
        self.artifacts = self.artifacts.model_copy(update=artifacts)
