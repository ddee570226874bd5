"""The description of the API is public, so building it must not block the server."""

from __future__ import annotations

import asyncio
import json
import threading

import httpx

from runtime.api.docs_page import ApiDescription


async def test_the_description_is_made_once_and_off_the_event_loop() -> None:
    threads = []

    def describe() -> dict[str, str]:
        threads.append(threading.get_ident())
        return {"openapi": "3.1.0"}

    description = ApiDescription(describe)
    bodies = await asyncio.gather(*(description.read() for _ in range(20)))
    assert {json.loads(body)["openapi"] for body in bodies} == {"3.1.0"}
    assert len(threads) == 1 and threads[0] != threading.get_ident()


def test_the_description_is_what_the_routes_are(http: httpx.Client) -> None:
    answer = http.get("/openapi.json")
    assert answer.headers["content-type"] == "application/json"
    assert "/v1/chat/completions" in answer.json()["paths"] and "/openapi.json" not in answer.json()["paths"]
