"""The critic behind an endpoint: a model that writes insights and scores the grader `rubric`.

Hazard: the critic reads what people said. That it leaves the machine is the operator's choice, and the reason why only
the configuration names an endpoint. Its errors stand in trajectories: they tell neither its address nor its own words.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from runtime.config import CriticModelConfig
from runtime.engine.client import Message
from runtime.errors import BudgetExceeded, PolicyError
from runtime.serving.chat_endpoint import ChatEndpoint, EndpointError, Sleep
from runtime.settings import read_key


class CriticEndpoint:
    """The `TextModel` of `[critic]`."""

    def __init__(self, config: CriticModelConfig, *, api_key: str | None = None, sleep: Sleep = asyncio.sleep) -> None:
        self._config = config
        self._endpoint = ChatEndpoint("critic", config, api_key=api_key, sleep=sleep)

    async def write(
        self, messages: Sequence[Message], *, max_tokens: int, response_format: dict[str, Any] | None = None
    ) -> str:
        """See `TextModel`."""
        seconds = self._config.timeout_seconds
        try:
            # Around all tries: a turn that is graded by a rubric waits for it.
            async with asyncio.timeout(seconds):
                reply = await self._endpoint.complete(messages, max_tokens=max_tokens, response_format=response_format)
        except TimeoutError:
            raise PolicyError(f"the critic gave no answer in {seconds:g} seconds (critic.timeout_seconds)") from None
        except EndpointError as error:
            if error.is_prompt_too_long:
                raise BudgetExceeded("the messages fill the critic's context (critic.context_tokens)") from None
            raise PolicyError(f"the critic {error.reason}", status=error.status) from None
        if not reply.content.strip():
            end = f", cut at its limit of {max_tokens} tokens" if reply.is_cut else ""
            raise PolicyError(f"the critic's answer is empty{end}")
        return reply.content

    async def context_tokens(self) -> int | None:
        """See `TextModel`."""
        return self._config.context_tokens


def open_critic(config: CriticModelConfig, environ: Mapping[str, str]) -> CriticEndpoint | None:
    """Return the configured critic; None without one.

    Raises:
        BadSettings: the variable with its key is missing.
    """
    if config.url is None:
        return None
    return CriticEndpoint(config, api_key=read_key("critic.api_key", config.api_key, environ))
