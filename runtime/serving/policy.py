"""What acts: a base model, an adapter or none, and a prompt, under one version.

Refuses to know how the adapter got onto the engine (hotswap.py) and what an episode is.
Invariant: an actor is the same weights and words for its whole life.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from memory.schema import Policy
from runtime.engine.client import Completion, Message, OnDelta
from runtime.engine.process import Engine


@dataclass(frozen=True)
class Actor:
    """One policy, ready to act: what a lease hands out."""

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
        tools: Sequence[dict[str, Any]] | None = None,
        *,
        temperature: float = 0.0,
        max_tokens: int = 512,
        seed: int | None = None,
        on_delta: OnDelta | None = None,
        **sampling: Any,
    ) -> Completion:
        """Return the policy's reply, streamed piece by piece when somebody listens.

        Raises:
            PolicyError: the engine refused; as EngineLost, it died.
            BudgetExceeded: the messages fill the model's context.
        """
        sampling |= {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
        # Listening costs the engine one message a token, so only when somebody does.
        if on_delta is None:
            return await self.engine.chat(self.served_name, messages, tools, **sampling)
        return await self.engine.chat_stream(self.served_name, messages, tools, on_delta=on_delta, **sampling)
