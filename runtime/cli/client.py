"""Calls to a running server, for the command line: patient with what passes, plain about what doesn't.

Refuses to know what an answer means. A server that is starting, restarting or briefly away is waited for; a refusal is
raised at once, in the server's own words.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any
from urllib.parse import quote

import httpx

DEFAULT_URL = "http://127.0.0.1:8080"
PATIENCE_SECONDS = 60.0
"""How long a server that once answered may be away."""
FIRST_CONTACT_SECONDS = 3.0
MAX_PAUSE_SECONDS = 5.0
BUSY = frozenset({429, 503})  # worth another try; anything else is an answer


class Refused(Exception):
    """The server said no. `body` is the inside of its error."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        super().__init__(body.get("message", "no reason given"))
        self.body = dict(body)


class NoServer(Exception):
    """Nobody answers at the address."""


class Client:
    """One server, asked over HTTP; usable as an async context manager."""

    def __init__(
        self, url: str = DEFAULT_URL, *, key: str | None = None, patience_seconds: float = PATIENCE_SECONDS
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._patience_seconds = patience_seconds
        self._has_answered = False
        timeout = httpx.Timeout(None, connect=5.0)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        # No proxy: the server is ours, and usually this machine.
        headers = {"Authorization": f"Bearer {key}"} if key else None
        self._http = httpx.AsyncClient(
            base_url=self.url, timeout=timeout, limits=limits, headers=headers, trust_env=False
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def get(self, path: str, **query: Any) -> dict[str, Any]:
        """Return the JSON at `path`. Raises: Refused, NoServer."""
        given = {name: value for name, value in query.items() if value is not None}
        return (await self._ask("GET", path, params=given)).json()

    async def get_text(self, path: str, **query: Any) -> str:
        """Return the text at `path`. Raises: Refused, NoServer."""
        return (await self._ask("GET", path, params=query)).text

    async def post(
        self, path: str, body: Mapping[str, Any] | None = None, *, is_repeatable: bool = False
    ) -> dict[str, Any]:
        """Return the JSON that `path` answers. A call that broke off midway is repeated only if that does no harm.

        Raises: Refused, NoServer.
        """
        return (await self._ask("POST", path, json=body, is_repeatable=is_repeatable)).json()

    async def delete(self, path: str) -> dict[str, Any]:
        """Delete what is at `path`, and return the JSON that it answers. Raises: Refused, NoServer."""
        return (await self._ask("DELETE", path)).json()

    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Yield the events of a streamed answer as they come.

        Raises: Refused, also for an error that comes as an event; NoServer.
        """
        response = await self._ask("POST", path, json=body, is_repeatable=False, is_streamed=True)
        try:
            async for line in response.aiter_lines():
                data = line.removeprefix("data: ")
                if data == line or data == "[DONE]":
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise Refused(event["error"])
                yield event
        except httpx.TransportError as error:
            raise NoServer(f"the server at {self.url} broke off: {type(error).__name__} {error}") from None
        finally:
            await response.aclose()

    async def _ask(
        self, method: str, path: str, *, is_repeatable: bool = True, is_streamed: bool = False, **request: Any
    ) -> httpx.Response:
        started, pause = time.monotonic(), 0.25
        while True:
            try:
                response = await self._http.send(
                    self._http.build_request(method, quote(path), **request), stream=is_streamed
                )
                if is_streamed and not response.is_success:
                    await response.aread()
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                problem: Exception = NoServer(
                    f"no server answers at {self.url}: start one with `serve.py serve` ({error})"
                )
                patience = self._patience_seconds if self._has_answered else FIRST_CONTACT_SECONDS
            except httpx.TransportError as error:
                problem = NoServer(f"the server at {self.url} broke off: {type(error).__name__} {error}")
                patience = self._patience_seconds if is_repeatable else 0.0
            else:
                self._has_answered = True
                if response.is_success:
                    return response
                problem, patience = Refused(_error_of(response)), 0.0
                if response.status_code in BUSY:
                    patience = self._patience_seconds
                    pause = max(pause, float(response.headers.get("Retry-After", 0)))
            if time.monotonic() - started + pause > patience:
                raise problem
            await asyncio.sleep(min(pause, MAX_PAUSE_SECONDS))
            pause *= 2


def _error_of(response: httpx.Response) -> dict[str, Any]:
    try:
        return {"status": response.status_code, **response.json()["error"]}
    except (ValueError, KeyError, TypeError):
        return {"status": response.status_code, "message": f"{response.status_code}: {response.text[:300]}"}
