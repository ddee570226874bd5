"""The tool `fetch_page`, which reads a page of the public web as text.

Steps: check the URL, connect to a checked address (`addresses.py`), follow redirects one by one with the same checks,
read text up to a limit, convert HTML to its visible text, and neutralise chat markup in it.
Invariant: requests carry no cookies, no credentials, and go through no proxy.
Hazard: pages may be crafted to exhaust the processor; every parsing step here takes linear time.
"""

from __future__ import annotations

import asyncio
import codecs
import html
import re
from dataclasses import replace
from typing import Annotated

import aiohttp
from annotated_types import MaxLen
from yarl import URL

from memory.chat_marks import neutralise
from runtime.errors import ToolError
from runtime.tools.addresses import IsAllowed, PublicResolver, is_public, public_socket_factory
from runtime.tools.base import Tool
from runtime.tools.functions import tool_from_function

SOURCE = "tools.web"
MAX_REDIRECTS = 5
MAX_BYTES = 2_000_000
TIMEOUT_SECONDS = 20.0
REDIRECTS = frozenset({301, 302, 303, 307, 308})
TEXT_TYPES = ("text/", "application/json", "application/xml", "application/xhtml+xml", "application/yaml")
UNSUPPORTED_CODECS = frozenset({"idna", "punycode", "raw-unicode-escape", "unicode-escape", "undefined", "utf-7"})
"""Codecs of Python that no page uses; decoding some of them takes quadratic time."""
TAG = re.compile(r"</?(?P<name>!--|[!?a-z][a-z0-9]*)", re.IGNORECASE)
INVISIBLE = ("script", "style", "template", "noscript", "svg")
INVISIBLE_END = {name: re.compile(rf"</{name}", re.IGNORECASE) for name in INVISIBLE}
"""End tags of invisible elements. Without `[^>]*>`, which takes quadratic time over many unclosed end tags."""
LONG_REFERENCE = re.compile(r"&#[0-9]{8,};?")
"""No character has a number this long, and Python's `int` raises for thousands of digits."""
INLINE = frozenset({"a", "abbr", "b", "cite", "code", "em", "i", "kbd", "mark", "q", "s", "small", "span", "strong"})
CELLS = frozenset({"td", "th"})
HEADERS = {"User-Agent": "ratchet-agent", "Accept": "text/html, text/plain, application/json;q=0.9, */*;q=0.1"}


def page_fetcher(is_allowed: IsAllowed = is_public) -> Tool:
    """Return the tool `fetch_page`. Tests replace `is_allowed`, because their servers are on the loopback."""

    async def fetch_page(url: Annotated[str, MaxLen(2_000)]) -> str:
        """Read a page of the public web as text.

        Args:
            url: its whole address, with http:// or https://
        """
        try:
            return await _fetch(url, is_allowed)
        except ToolError as error:  # its message may quote the site
            raise ToolError(neutralise(str(error))) from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ToolError(neutralise(f"{url!r} cannot be read: {error or type(error).__name__}")) from error

    tool = tool_from_function(fetch_page, timeout_seconds=TIMEOUT_SECONDS, max_concurrency=8, source=SOURCE)
    return replace(tool, is_trusted=False)


def check_url(text: str | URL) -> URL:
    """Return the parsed URL. Raises: ToolError for another scheme, a missing host, or credentials."""
    try:
        url = URL(text) if isinstance(text, str) else text
        port = url.port
    except ValueError as error:
        raise ToolError(f"{text!r} is not a URL: {error}") from error
    if url.scheme not in ("http", "https"):
        raise ToolError(f"{str(url)!r} is not fetched: only http:// and https:// are")
    # yarl knows the default ports: an explicit port 0 is refused too.
    if not url.host or not port:
        raise ToolError(f"{str(url)!r} names no host")
    if url.user is not None or url.password is not None:
        raise ToolError(f"{url.host!r} is not fetched with credentials in the URL: leave them out")
    return url


async def _fetch(text: str, is_allowed: IsAllowed) -> str:
    url = check_url(text)
    connector = aiohttp.TCPConnector(
        resolver=PublicResolver(is_allowed),
        socket_factory=public_socket_factory(is_allowed),
        use_dns_cache=False,  # every connection resolves, and checks, its host
        force_close=True,
    )
    # No trust_env: a proxy would resolve names itself and bypass the checks.
    async with aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        headers=HEADERS,
        timeout=aiohttp.ClientTimeout(total=None),  # the tool's own deadline ends it
    ) as session:
        # One by one and not by aiohttp, which would follow a redirect without `check_url`.
        for _ in range(MAX_REDIRECTS + 1):
            async with session.get(url, allow_redirects=False) as response:
                if response.status not in REDIRECTS or "Location" not in response.headers:
                    return await _read_text(response)
                url = check_url(_redirect_target(url, response.headers["Location"]))
    raise ToolError(f"{text!r} redirects more than {MAX_REDIRECTS} times")


def _redirect_target(url: URL, location: str) -> URL:
    try:
        return url.join(URL(location))
    except ValueError as error:
        raise ToolError(f"{str(url)!r} redirects to {location!r}, which is not a URL") from error


async def _read_text(response: aiohttp.ClientResponse) -> str:
    """Return a response as text. Raises: ToolError for an error status or another content type."""
    if response.status >= 400:
        raise ToolError(f"{str(response.url)!r} answered {response.status} {response.reason}")
    if not response.content_type.startswith(TEXT_TYPES) and not response.content_type.endswith(("+json", "+xml")):
        raise ToolError(f"{str(response.url)!r} is {response.content_type}, not text")
    body = bytearray()
    # Decompressed bytes, so that the limit below also ends a compressed bomb.
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > MAX_BYTES:  # a declared length is not trusted
            break
    is_html = response.content_type in ("text/html", "application/xhtml+xml")
    text = await asyncio.to_thread(_to_text, bytes(body[:MAX_BYTES]), response.charset, is_html)
    if len(body) > MAX_BYTES:
        text += f"\n[only the first {MAX_BYTES} bytes were read]"
    return text or "The page is empty."


def _to_text(body: bytes, charset: str | None, is_html: bool) -> str:
    """Return the text of a body for the model. Slow for megabytes: it must run in a thread."""
    try:
        name = codecs.lookup(charset or "utf-8").name
        text = body.decode("utf-8" if name in UNSUPPORTED_CODECS else name, "replace")
    except LookupError:  # an unknown charset
        text = body.decode("utf-8", "replace")
    return neutralise(visible_text(text) if is_html else text)


def visible_text(page: str) -> str:
    """Return the visible text of an HTML page. An unclosed tag ends the page."""
    # Not html.parser: it takes quadratic time over pages crafted for it.
    parts, start = [], 0
    while (tag := TAG.search(page, start)) is not None:
        parts.append(page[start : tag.start()])
        name = tag["name"].lower()
        if name == "!--":
            start = page.find("-->", tag.end()) + 3
        elif name in INVISIBLE_END:
            end_tag = INVISIBLE_END[name].search(page, tag.end())
            start = page.find(">", end_tag.end()) + 1 if end_tag else 0
        else:
            parts.append("" if name in INLINE else " " if name in CELLS else "\n")
            start = page.find(">", tag.end()) + 1
        if start < tag.end():  # `find` returned -1: the tag is not closed
            break
    else:
        parts.append(page[start:])
    text = html.unescape(LONG_REFERENCE.sub("\ufffd", "".join(parts)))
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "\n".join(line for line in lines if line)
