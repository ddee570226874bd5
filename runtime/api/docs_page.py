"""The API's description, `/openapi.json`, and the pages that show it, `/docs` and `/redoc`.

Scripts and styles come from the package `fastapi_offline`, so that the pages work without a network.
Hazard: these routes need no key, so nothing here may take the event loop's time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response

from runtime.api.errors import NotFound

router = APIRouter(include_in_schema=False)

ASSETS = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "redoc.standalone.js": "text/javascript",
    "favicon.png": "image/png",
}
ASSETS_URL = "/docs/assets"
OPENAPI_URL = "/openapi.json"
TITLE = "Ratchet"


class ApiDescription:
    """The OpenAPI document as bytes, made at the first request, once: that takes most of a second."""

    def __init__(self, describe: Callable[[], dict[str, Any]]) -> None:
        self._describe = describe
        self._lock = asyncio.Lock()
        self._body: bytes | None = None

    async def read(self) -> bytes:
        async with self._lock:
            if self._body is None:
                self._body = await asyncio.to_thread(lambda: bytes(JSONResponse(self._describe()).body))
            return self._body


@router.api_route(OPENAPI_URL, methods=["GET", "HEAD"])
async def send_description(request: Request) -> Response:
    description: ApiDescription = request.app.state.description
    return Response(await description.read(), media_type="application/json")


@router.get("/docs")
async def show_swagger() -> HTMLResponse:
    return get_swagger_ui_html(
        openapi_url=OPENAPI_URL,
        title=TITLE,
        swagger_js_url=f"{ASSETS_URL}/swagger-ui-bundle.js",
        swagger_css_url=f"{ASSETS_URL}/swagger-ui.css",
        swagger_favicon_url=f"{ASSETS_URL}/favicon.png",
    )


@router.get("/redoc")
async def show_redoc() -> HTMLResponse:
    return get_redoc_html(
        openapi_url=OPENAPI_URL,
        title=TITLE,
        redoc_js_url=f"{ASSETS_URL}/redoc.standalone.js",
        redoc_favicon_url=f"{ASSETS_URL}/favicon.png",
        with_google_fonts=False,  # the page must load nothing from elsewhere
    )


@router.get("/docs/assets/{name}")
async def send_asset(name: str) -> FileResponse:
    if name not in ASSETS:  # also keeps paths such as `../` out
        raise NotFound(f"there is no asset {name!r}", code="no_such_route")
    path = Path(str(files("fastapi_offline") / "static" / name))
    return FileResponse(path, media_type=ASSETS[name])
