"""For browsers: the API's description without a network, and CORS for the origins that the operator configures."""

from __future__ import annotations

import re

import httpx
import pytest

from memory.schema import Scope
from runtime.api.app import create_app
from runtime.config import ServerConfig
from tests.runtime.api.worlds import ServedWorld

PAGE = "https://app.example.com"


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_the_description_of_the_api_loads_nothing_from_elsewhere(http: httpx.Client, path: str) -> None:
    page = http.get(path)
    assert page.status_code == 200
    linked = re.findall(r"""(?:src|href)=["']([^"']+)["']""", page.text)
    assert len(linked) >= 2
    for link in linked:
        assert link.startswith("/docs/assets/"), link
        assert http.get(link).status_code == 200
    assert http.get("/docs/assets/..%2Fcore.py").status_code == 404


async def test_a_page_that_the_operator_names_may_ask_and_another_may_not(world: ServedWorld) -> None:
    await world.memory.keys.create("shop", [Scope.INFER])
    world.services.server = ServerConfig(cors_origins=(PAGE,))
    transport = httpx.ASGITransport(create_app(world.services))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
        asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        allowed = await http.options("/v1/chat/completions", headers={"Origin": PAGE, **asks})
        refused = await http.options("/v1/chat/completions", headers={"Origin": "https://evil.example", **asks})
        unknown = await http.get("/v1/models", headers={"Origin": PAGE})
    assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == PAGE
    assert "access-control-allow-origin" not in refused.headers
    assert unknown.status_code == 401 and unknown.headers["access-control-allow-origin"] == PAGE


def test_without_the_setting_no_page_may_ask(http: httpx.Client) -> None:
    answer = http.get("/v1/models", headers={"Origin": PAGE})
    assert "access-control-allow-origin" not in answer.headers
