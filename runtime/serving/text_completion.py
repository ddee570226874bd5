"""Text from the base model, in JSON of a schema where the engine supports that.

An engine that rejects schemas is called without one from then on, so that a rejection costs one call in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import structlog

from runtime.engine.client import Message
from runtime.errors import PolicyError
from runtime.serving.hotswap import HotSwap
from runtime.serving.policy import LeasedPolicy

log = structlog.get_logger()

# `Policies.register_base` gives the bare base this version in every database.
BASE_VERSION = 0
REFUSALS = {400, 422, 501}
"""HTTP statuses with which OpenAI-compatible servers reject an unknown parameter."""


class TextCompletion:
    """Writes text with the base model, whichever policy is active."""

    def __init__(self, hotswap: HotSwap) -> None:
        self._hotswap = hotswap
        self._takes_schemas = True

    async def complete(self, messages: Sequence[Message], *, schema: dict[str, Any], max_tokens: int) -> str:
        """Return the model's answer: JSON of `schema` where the engine supports schemas, free text elsewhere.

        Raises:
            PolicyError, EngineError: there is no answer. BudgetExceeded: the messages fill the model's context.
        """
        async with self._hotswap.lease(BASE_VERSION) as base:
            if not self._takes_schemas:
                return (await base.complete(messages, max_tokens=max_tokens)).content
            try:
                return await _complete_in_json(base, messages, schema, max_tokens)
            except PolicyError as refusal:
                if refusal.status not in REFUSALS:
                    raise
                answer = (await base.complete(messages, max_tokens=max_tokens)).content
                self._takes_schemas = False  # the call without it succeeded: the schema was rejected, not the messages
                log.warning("the engine takes no JSON schemas", reason=refusal.message)
                return answer

    async def context_tokens(self) -> int | None:
        """Return how many tokens the model can hold, prompt and answer together; None where the engine does not say.

        Raises:
            PolicyError, EngineError: the engine does not answer.
        """
        async with self._hotswap.lease(BASE_VERSION) as base:
            models = await base.engine.client.models()
            base_model = next((model for model in models if model["id"] == base.served_name), {})
            return base_model.get("max_model_len")


async def _complete_in_json(
    base: LeasedPolicy, messages: Sequence[Message], schema: dict[str, Any], max_tokens: int
) -> str:
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    return (await base.complete(messages, max_tokens=max_tokens, response_format=form)).content
