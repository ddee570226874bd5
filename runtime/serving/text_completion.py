"""Text from a model, in JSON of a schema where its server supports that.

A server that rejects schemas is called without one from then on, so that a rejection costs one call in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import structlog

from runtime.engine.client import Message
from runtime.errors import PolicyError
from runtime.serving.hotswap import HotSwap

log = structlog.get_logger()

# `Policies.register_base` gives the bare base this version in every database.
BASE_VERSION = 0
REFUSALS = {400, 422, 501}
"""HTTP statuses with which OpenAI-compatible servers reject an unknown parameter."""


class TextModel(Protocol):
    """A model that `TextCompletion` calls: the base of the engine, or one behind an endpoint."""

    async def write(
        self, messages: Sequence[Message], *, max_tokens: int, response_format: dict[str, Any] | None = None
    ) -> str:
        """Return the model's reply.

        Raises:
            PolicyError, EngineError: there is none. BudgetExceeded: the messages fill the model's context.
        """
        ...

    async def context_tokens(self) -> int | None:
        """Return how many tokens the model can hold, prompt and answer together; None where nobody says.

        Raises:
            PolicyError, EngineError: the engine does not answer.
        """
        ...


class ServedBase:
    """The base model of the engine, whichever policy is active."""

    def __init__(self, hotswap: HotSwap) -> None:
        self._hotswap = hotswap

    async def write(
        self, messages: Sequence[Message], *, max_tokens: int, response_format: dict[str, Any] | None = None
    ) -> str:
        """See `TextModel`."""
        form: dict[str, Any] = {} if response_format is None else {"response_format": response_format}
        async with self._hotswap.lease(BASE_VERSION) as base:
            return (await base.complete(messages, max_tokens=max_tokens, **form)).content

    async def context_tokens(self) -> int | None:
        """See `TextModel`."""
        async with self._hotswap.lease(BASE_VERSION) as base:
            models = await base.engine.client.models()
            base_model = next((model for model in models if model["id"] == base.served_name), {})
            return base_model.get("max_model_len")


class TextCompletion:
    """Answers with a model, in JSON where that is possible."""

    def __init__(self, model: TextModel) -> None:
        self._model = model
        self._takes_schemas = True

    async def complete(self, messages: Sequence[Message], *, schema: dict[str, Any], max_tokens: int) -> str:
        """Return the model's answer: JSON of `schema` where its server supports schemas, free text elsewhere.

        Raises: as `TextModel.write`.
        """
        if not self._takes_schemas:
            return await self._model.write(messages, max_tokens=max_tokens)
        form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
        try:
            return await self._model.write(messages, max_tokens=max_tokens, response_format=form)
        except PolicyError as refusal:
            if refusal.status not in REFUSALS:
                raise
            answer = await self._model.write(messages, max_tokens=max_tokens)
            self._takes_schemas = False  # the call without it succeeded: the schema was rejected, not the messages
            log.warning("the critic takes no JSON schemas", reason=refusal.message)
            return answer

    async def context_tokens(self) -> int | None:
        """See `TextModel`."""
        return await self._model.context_tokens()
