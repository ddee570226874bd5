"""The description of the API for people, `/docs` and `/redoc`. Its scripts and styles come from an installed package,
so that it works on a machine without a network."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from fastapi import APIRouter
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse

from runtime.api.errors import NotFound

router = APIRouter(include_in_schema=False)

ASSETS = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "redoc.standalone.js": "text/javascript",
    "favicon.png": "image/png",
}
HOME = "/docs/assets"
ABOUT = {"openapi_url": "/openapi.json", "title": "Ratchet"}


@router.get("/docs")
async def show_swagger() -> HTMLResponse:
    return get_swagger_ui_html(
        **ABOUT,
        swagger_js_url=f"{HOME}/swagger-ui-bundle.js",
        swagger_css_url=f"{HOME}/swagger-ui.css",
        swagger_favicon_url=f"{HOME}/favicon.png",
    )


@router.get("/redoc")
async def show_redoc() -> HTMLResponse:
    return get_redoc_html(
        **ABOUT,
        redoc_js_url=f"{HOME}/redoc.standalone.js",
        redoc_favicon_url=f"{HOME}/favicon.png",
        with_google_fonts=False,
    )


@router.get("/docs/assets/{name}")
async def send_asset(name: str) -> FileResponse:
    if name not in ASSETS:
        raise NotFound(f"there is no asset {name!r}", code="no_such_route")
    path = Path(str(files("fastapi_offline") / "static" / name))
    return FileResponse(path, media_type=ASSETS[name])
