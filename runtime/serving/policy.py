"""A policy that is ready to act: a base model, an adapter or none, and a prompt, under one version.

Invariant: a leased policy has the same weights and prompt for its whole life.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from memory.schema import Policy
from runtime.engine.client import Completion, Message, OnDelta, ToolDefinition
from runtime.engine.process import Engine


@dataclass(frozen=True)
class LeasedPolicy:
    """One policy that stays loaded. A lease of `HotSwap` makes it; the agent calls it."""

    policy: Policy
    served_name: str
    """The engine's name for it: the adapter's, or the base's."""
    engine: Engine

    @property
    def version(self) -> int:
        return self.policy.version

    async def complete(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolDefinition] | None = None,
        *,
        temperature: float = 0.0,
        max_tokens: int = 512,
        seed: int | None = None,
        on_delta: OnDelta | None = None,
        partial: Completion | None = None,
        **sampling: Any,
    ) -> Completion:
        """Return the policy's reply; `on_delta` is awaited with each piece of it, and `partial` holds those so far.

        Args:
            max_tokens: limit of the reply, in tokens.
            sampling: further parameters that vLLM gets unchanged.

        Raises:
            PolicyError: the engine rejected the call; EngineLost: it died.
            BudgetExceeded: the messages fill the model's context.
        """
        sampling |= {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
        # A stream costs the engine one message per token, so it is used only on request.
        if on_delta is None:
            return await self.engine.client.chat(self.served_name, messages, tools, **sampling)
        return await self.engine.client.chat_stream(
            self.served_name, messages, tools, on_delta=on_delta, partial=partial, **sampling
        )
