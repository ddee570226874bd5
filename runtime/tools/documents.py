"""The tool `search_documents`, which finds passages in the stored documents.

Invariants: only documents of the episode's tenant are searched; passages of untrusted documents mark the result as
untrusted.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Protocol

from annotated_types import Interval, MinLen

from memory.errors import StorageError
from memory.trust import UntrustedText
from runtime.errors import ToolError
from runtime.tools.base import Tool
from runtime.tools.functions import tool_from_function

SOURCE = "tools.documents"


class FindPassages(Protocol):
    """Memory's search, as the tool uses it."""

    async def __call__(self, query_text: str, num: int, *, tenant: str = "") -> list[str]:
        """Return the passages of a tenant's documents that best match a question, best first."""
        ...


def document_search(find_passages: FindPassages) -> Tool:
    """Return the tool `search_documents`."""

    async def search(query: str, num_passages: int, tenant: str) -> str:
        try:
            passages = await find_passages(query, num_passages, tenant=tenant)
        except StorageError as error:
            raise ToolError(f"the documents cannot be read now: {error}") from error
        text = "\n\n".join(passages) or "No passage fits; try other words."
        # `join` returns a plain str: the mark of the passages has to be put on again.
        return UntrustedText(text) if any(isinstance(it, UntrustedText) for it in passages) else text

    async def search_documents(
        query: Annotated[str, MinLen(1)], num_passages: Annotated[int, Interval(ge=1, le=10)] = 3
    ) -> str:
        """Find passages of the documents you were given to read.

        Args:
            query: what to look for, in words that the text may use
            num_passages: how many passages to show at most
        """
        return await search(query, num_passages, "")

    async def search_for(tenant: str, arguments: dict[str, Any]) -> str:
        return await search(arguments["query"], int(arguments.get("num_passages", 3)), tenant)

    tool = tool_from_function(search_documents, source=SOURCE, max_concurrency=16)
    # `search_documents` itself only provides the schema; every call goes through `search_for` with its tenant.
    return replace(tool, call_for=search_for)
