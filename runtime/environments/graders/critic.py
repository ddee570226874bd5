"""The grader that asks a critic behind a URL: a model or a program of the operator's, anywhere.

It is sent the task, its messages and the answer as JSON, and replies `{"reward": 0..1, "comment": "..."}`.
Invariants: a task file names a critic of the configuration, never an address, so a file from elsewhere cannot choose
where replies are sent. A critic that fails raises, so that no reply is blamed for it. The key stands in one header; it
and the address stay out of every message, because trajectories show them. Redirects are not followed: they would carry
both elsewhere.
Hazard: the address may be a private one. That is the operator's choice, and the reason why only the configuration has
it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus
from typing import Any, Literal

import httpx
from pydantic import Field, JsonValue

from runtime.config import CriticConfig
from runtime.engine.client import ToolDefinition
from runtime.environments.base import Outcome
from runtime.environments.graders.base import Grader, GradingResources, Submission, quote
from runtime.errors import CriticFailed

MAX_TRIES = 3
FIRST_PAUSE_SECONDS = 1.0
"""Doubled after each further try."""
MAX_REPLY_BYTES = 65_536
MAX_COMMENT_CHARS = 1_000
PASSING_STATUSES = frozenset({429, 500, 502, 503, 504})

Sleep = Callable[[float], Awaitable[object]]


class Critic:
    """One critic of the configuration."""

    def __init__(
        self, name: str, config: CriticConfig, *, api_key: str | None = None, sleep: Sleep = asyncio.sleep
    ) -> None:
        self._name = name
        self._config = config
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else None
        self._sleep = sleep

    async def score(self, question: dict[str, Any]) -> Outcome:
        """Return the critic's outcome. Failures that may pass are tried again, `MAX_TRIES` times in all.

        Raises:
            CriticFailed: it gave no reward.
        """
        pause = FIRST_PAUSE_SECONDS
        for number in range(1, MAX_TRIES + 1):
            try:
                return self._read(await self._ask(question))
            except _Passing as passing:
                if number == MAX_TRIES:
                    raise CriticFailed(f"{passing}, {MAX_TRIES} times") from None
            await self._sleep(pause)
            pause *= 2
        raise AssertionError("the last try returns or raises")

    async def _ask(self, question: dict[str, Any]) -> bytes:
        """Return the body of the critic's reply. Raises: _Passing, CriticFailed."""
        seconds = self._config.timeout_seconds
        try:
            # Around the whole of it: httpx bounds each read, and a reply may trickle in for ever.
            async with (
                asyncio.timeout(seconds),
                # A client a call, because a client belongs to one event loop.
                httpx.AsyncClient(timeout=seconds, headers=self._headers, follow_redirects=False) as http,
                http.stream("POST", self._config.url, json=question) as response,
            ):
                self._require_success(response.status_code)
                body = b""
                async for piece in response.aiter_bytes():
                    body += piece
                    if len(body) > MAX_REPLY_BYTES:
                        raise CriticFailed(f"the critic {self._name!r} replied more than {MAX_REPLY_BYTES} bytes")
                return body
        except (TimeoutError, httpx.TimeoutException):
            raise _Passing(
                f"the critic {self._name!r} did not reply within {seconds:g} seconds (timeout_seconds)"
            ) from None
        except httpx.TransportError as error:
            raise _Passing(f"the critic {self._name!r} cannot be reached ({type(error).__name__})") from None

    def _require_success(self, status: int) -> None:
        if 200 <= status < 300:
            return
        phrase = HTTPStatus(status).phrase if status in set(HTTPStatus) else "unknown status"
        message = f"the critic {self._name!r} answered {status} {phrase}"
        if status in PASSING_STATUSES:
            raise _Passing(message)
        if 300 <= status < 400:
            message += ": redirects are not followed, so configure its final URL"
        elif status in (401, 403):
            message += ": configure the variable that holds its key as its api_key"
        raise CriticFailed(message)

    def _read(self, body: bytes) -> Outcome:
        form = '{"reward": a number from 0 to 1, "comment": a text or nothing}'
        try:
            reply = json.loads(body)
            reward, comment = reply["reward"], reply.get("comment")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise CriticFailed(
                f"the critic {self._name!r} replied {quote(body.decode('utf-8', 'replace'))}, not {form}"
            ) from None
        # NaN fails the comparison, too; a bool is an int.
        is_number = isinstance(reward, int | float) and not isinstance(reward, bool)
        if not is_number or not 0 <= reward <= 1:
            raise CriticFailed(f"the critic {self._name!r} gave the reward {quote(reward)}, not a number from 0 to 1")
        if comment is not None and not isinstance(comment, str):
            raise CriticFailed(f"the critic {self._name!r} gave the comment {quote(comment)}, not a text")
        reason = (comment or "").strip()[:MAX_COMMENT_CHARS]
        return Outcome(float(reward), reason or f"the critic {self._name!r} gave {reward:g}")


class _Passing(Exception):
    """A failure that may pass."""


class Url(Grader):
    """A critic behind a URL gives the reward."""

    type: Literal["url"]
    critic: str = Field(min_length=1)
    """Its name in `[environments.NAME.critics]`."""
    reference: JsonValue = None
    """Anything that the critic is sent beside the answer, such as the right one."""

    async def grade(self, submission: Submission, resources: GradingResources) -> Outcome:
        question = {
            "task": submission.task,
            "messages": list(submission.messages),
            "answer": submission.text,
            "calls": [{"name": call.name, "arguments": call.arguments} for call in submission.calls],
            "reference": self.reference,
        }
        return await resources.critics[self.critic].score(question)

    def check(self, tools: Sequence[ToolDefinition], resources: GradingResources, *, has_database: bool) -> None:
        if self.critic not in resources.critics:
            known = ", ".join(map(repr, resources.critics)) or "none"
            raise ValueError(
                f"the critic {self.critic!r} is not configured (there is: {known}): name its address in the "
                f'environment\'s critics, {self.critic} = {{ url = "http://..." }}'
            )

    @property
    def needs_critic(self) -> bool:
        return True
