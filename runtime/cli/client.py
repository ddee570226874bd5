"""An HTTP client for a running server, with retries.

A server that is starting, restarting or overloaded is retried; any other error of the server is raised at once with its
message. Hazard: a POST that broke off midway is repeated only with `is_repeatable`, because the server may have acted.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any
from urllib.parse import quote

import httpx

# Equal to options.py's, which must not import this module: httpx would slow down every command.
DEFAULT_URL = "http://127.0.0.1:8080"
PATIENCE_SECONDS = 60.0
"""How long a server that has answered before is retried."""
FIRST_CONTACT_SECONDS = 3.0
MAX_PAUSE_SECONDS = 5.0
RETRIED_STATUSES = frozenset({429, 503})
QueryValue = str | int | float | bool | None


class ErrorReply(Exception):
    """The server answered with an error. `body` holds the error's fields and the HTTP `status`."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        super().__init__(body.get("message", "no reason given"))
        self.body = dict(body)


class ServerUnreachable(Exception):
    """No server answers at the address, or the connection broke off."""


class Client:
    """A connection pool to one server; usable as an async context manager."""

    def __init__(
        self, url: str = DEFAULT_URL, *, key: str | None = None, patience_seconds: float = PATIENCE_SECONDS
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._patience_seconds = patience_seconds
        self._has_answered = False
        timeout = httpx.Timeout(None, connect=5.0)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        # trust_env=False: no proxy, because the server usually is on this machine.
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

    async def get(self, path: str, **query: QueryValue) -> dict[str, Any]:
        """Return the JSON at `path`; parameters that are None are left out. Raises: ErrorReply, ServerUnreachable."""
        return (await self._request("GET", path, params=_given(query))).json()

    async def get_all(self, path: str, **query: QueryValue) -> dict[str, Any]:
        """Return the list at `path` with the rows of all pages. Raises: as `get`."""
        listed = await self.get(path, **query)
        while (offset := listed["next_offset"]) is not None:
            page = await self.get(path, **query, offset=offset)
            listed = {**page, "data": listed["data"] + page["data"]}
        return listed

    async def get_text(self, path: str, **query: QueryValue) -> str:
        """Return the text at `path`. Raises: ErrorReply, ServerUnreachable."""
        return (await self._request("GET", path, params=query)).text

    async def post(
        self, path: str, body: Mapping[str, Any] | None = None, *, is_repeatable: bool = False
    ) -> dict[str, Any]:
        """Post JSON and return the JSON of the answer. `is_repeatable`: posting twice has no further effect.

        Raises: ErrorReply, ServerUnreachable.
        """
        return (await self._request("POST", path, body=body, is_repeatable=is_repeatable)).json()

    async def post_lines(self, path: str, lines: bytes, **query: QueryValue) -> dict[str, Any]:
        """Post rows, one per line, and return the JSON of the answer. Posting twice must have no further effect.

        Raises: ErrorReply, ServerUnreachable.
        """
        return (await self._request("POST", path, params=_given(query), lines=lines)).json()

    async def delete(self, path: str, **query: QueryValue) -> dict[str, Any]:
        """Delete the resource at `path` and return the JSON of the answer. Raises: ErrorReply, ServerUnreachable."""
        return (await self._request("DELETE", path, params=_given(query))).json()

    async def stream_lines(self, path: str, **query: QueryValue) -> AsyncIterator[dict[str, Any]]:
        """Yield the JSON of each line of a streamed answer. Raises: ErrorReply, ServerUnreachable."""
        response = await self._request("GET", path, params=_given(query), is_streamed=True)
        try:
            async for line in response.aiter_lines():
                yield json.loads(line)
        except httpx.TransportError as error:
            raise ServerUnreachable(f"the server at {self.url} broke off: {type(error).__name__} {error}") from None
        finally:
            await response.aclose()

    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Yield the events of a streamed answer.

        Raises: ErrorReply, also for an error event; ServerUnreachable.
        """
        response = await self._request("POST", path, body=body, is_repeatable=False, is_streamed=True)
        try:
            async for line in response.aiter_lines():
                data = line.removeprefix("data: ")
                # Lines without the prefix are empty separators or comments.
                if data == line or data == "[DONE]":
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise ErrorReply(event["error"])
                yield event
        except httpx.TransportError as error:
            raise ServerUnreachable(f"the server at {self.url} broke off: {type(error).__name__} {error}") from None
        finally:
            await response.aclose()

    async def _request(
        self,
        method: str,
        path: str,
        *,
        is_repeatable: bool = True,
        is_streamed: bool = False,
        params: Mapping[str, QueryValue] | None = None,
        body: Mapping[str, Any] | None = None,
        lines: bytes | None = None,
    ) -> httpx.Response:
        headers = None if lines is None else {"Content-Type": "application/x-ndjson"}
        started, pause = time.monotonic(), 0.25
        while True:
            try:
                request = self._http.build_request(
                    method, quote(path), params=params, json=body, content=lines, headers=headers
                )
                response = await self._http.send(request, stream=is_streamed)
                # A streamed response has no body until it is read.
                if is_streamed and not response.is_success:
                    await response.aread()
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                failure: Exception = ServerUnreachable(
                    f"no server answers at {self.url}: start one with `serve.py serve` ({error})"
                )
                # Nothing was sent, so that every method may be repeated; a wrong address should fail fast.
                patience = self._patience_seconds if self._has_answered else FIRST_CONTACT_SECONDS
            except httpx.TransportError as error:
                failure = ServerUnreachable(f"the server at {self.url} broke off: {type(error).__name__} {error}")
                patience = self._patience_seconds if is_repeatable else 0.0
            else:
                self._has_answered = True
                if response.is_success:
                    return response
                failure, patience = ErrorReply(_error_fields(response)), 0.0
                if response.status_code in RETRIED_STATUSES:
                    patience = self._patience_seconds
                    # This server sends seconds; a proxy before it may send a date, which is not waited for.
                    with contextlib.suppress(ValueError):
                        pause = max(pause, float(response.headers.get("Retry-After", 0)))
            if time.monotonic() - started + pause > patience:
                raise failure
            await asyncio.sleep(min(pause, MAX_PAUSE_SECONDS))
            pause *= 2


def _given(query: Mapping[str, QueryValue]) -> dict[str, QueryValue]:
    return {name: value for name, value in query.items() if value is not None}


def _error_fields(response: httpx.Response) -> dict[str, Any]:
    try:
        return {"status": response.status_code, **response.json()["error"]}
    except (ValueError, KeyError, TypeError):
        return {"status": response.status_code, "message": f"{response.status_code}: {response.text[:300]}"}
