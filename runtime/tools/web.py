"""A tool that reads a page of the public web.

Refuses to know which addresses are public (addresses.py) and to log in anywhere: no cookies, no credentials, no proxy.
Flow: check the URL -> connect to a vetted address -> follow redirects by hand, each hop checked like the first ->
read text up to a limit -> HTML becomes what a reader would see, in which nothing can speak as the system.
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
from runtime.tools.addresses import IsAllowed, PublicResolver, is_public, public_sockets
from runtime.tools.base import Tool
from runtime.tools.functions import tool_from_function

SOURCE = "tools.web"
MAX_REDIRECTS = 5
MAX_BYTES = 2_000_000
TIMEOUT_SECONDS = 20.0
REDIRECTS = frozenset({301, 302, 303, 307, 308})
TEXT_TYPES = ("text/", "application/json", "application/xml", "application/xhtml+xml", "application/yaml")
ODD_CODECS = frozenset({"idna", "punycode", "raw-unicode-escape", "unicode-escape", "undefined", "utf-7"})
"""Python knows them, no page is written in them, and some take quadratic time."""
TAG = re.compile(r"</?(?P<name>!--|[!?a-z][a-z0-9]*)", re.IGNORECASE)
UNSEEN = {name: re.compile(rf"</{name}", re.IGNORECASE) for name in ("script", "style", "template", "noscript", "svg")}
"""Where an element ends whose content no reader sees. No `[^>]*>` here: over many unclosed ends that is quadratic."""
LONG_REFERENCE = re.compile(r"&#[0-9]{8,};?")
"""No character has so long a number, and Python refuses to convert numbers of thousands of digits."""
INLINE = frozenset({"a", "abbr", "b", "cite", "code", "em", "i", "kbd", "mark", "q", "s", "small", "span", "strong"})
CELLS = frozenset({"td", "th"})
HEADERS = {"User-Agent": "ratchet-agent", "Accept": "text/html, text/plain, application/json;q=0.9, */*;q=0.1"}


def page_fetcher(is_allowed: IsAllowed = is_public) -> Tool:
    """Return the tool. `is_allowed` is for tests, whose servers are on the loopback."""

    async def fetch_page(url: Annotated[str, MaxLen(2_000)]) -> str:
        """Read a page of the public web as text.

        Args:
            url: its whole address, with http:// or https://
        """
        try:
            return await _fetch(url, is_allowed)
        except ToolError as error:  # may quote what the site said
            raise ToolError(neutralise(str(error))) from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ToolError(neutralise(f"{url!r} cannot be read: {error or type(error).__name__}")) from error

    tool = tool_from_function(fetch_page, timeout_seconds=TIMEOUT_SECONDS, max_concurrency=8, source=SOURCE)
    return replace(tool, is_trusted=False)


def check_url(text: str | URL) -> URL:
    """Return the URL. Raises ToolError for one that is never fetched, whatever it points at."""
    try:
        url = URL(text) if isinstance(text, str) else text
        port = url.port
    except ValueError as error:
        raise ToolError(f"{text!r} is not a URL: {error}") from error
    if url.scheme not in ("http", "https"):
        raise ToolError(f"{str(url)!r} is not fetched: only http:// and https:// are")
    if not url.host or not port:
        raise ToolError(f"{str(url)!r} names no host")
    if url.user is not None or url.password is not None:
        raise ToolError(f"{url.host!r} is not fetched with credentials in the URL: leave them out")
    return url


async def _fetch(text: str, is_allowed: IsAllowed) -> str:
    url = check_url(text)
    connector = aiohttp.TCPConnector(
        resolver=PublicResolver(is_allowed),
        socket_factory=public_sockets(is_allowed),
        use_dns_cache=False,  # one look-up for one connection
        force_close=True,
    )
    # No trust_env: a proxy would look names up by itself, behind our back.
    async with aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        headers=HEADERS,
        timeout=aiohttp.ClientTimeout(total=None),  # the tool's own deadline ends it
    ) as session:
        for _ in range(MAX_REDIRECTS + 1):
            async with session.get(url, allow_redirects=False) as response:
                if response.status not in REDIRECTS or "Location" not in response.headers:
                    return await _read(response)
                url = check_url(_follow(url, response.headers["Location"]))
    raise ToolError(f"{text!r} redirects more than {MAX_REDIRECTS} times")


def _follow(url: URL, location: str) -> URL:
    try:
        return url.join(URL(location))
    except ValueError as error:
        raise ToolError(f"{str(url)!r} redirects to {location!r}, which is not a URL") from error


async def _read(response: aiohttp.ClientResponse) -> str:
    """Return a response as text. Raises ToolError for one that went wrong or isn't text."""
    if response.status >= 400:
        raise ToolError(f"{str(response.url)!r} answered {response.status} {response.reason}")
    if not response.content_type.startswith(TEXT_TYPES) and not response.content_type.endswith(("+json", "+xml")):
        raise ToolError(f"{str(response.url)!r} is {response.content_type}, not text")
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > MAX_BYTES:
            break
    is_html = response.content_type in ("text/html", "application/xhtml+xml")
    text = await asyncio.to_thread(_as_text, bytes(body[:MAX_BYTES]), response.charset, is_html)
    if len(body) > MAX_BYTES:
        text += f"\n[only the first {MAX_BYTES} bytes were read]"
    return text or "The page is empty."


def _as_text(body: bytes, charset: str | None, is_html: bool) -> str:
    """Return what the model is shown of a body: megabytes of work, which must not be done on the event loop."""
    try:
        name = codecs.lookup(charset or "utf-8").name
        text = body.decode("utf-8" if name in ODD_CODECS else name, "replace")
    except LookupError:  # a charset that nobody knows
        text = body.decode("utf-8", "replace")
    return neutralise(as_read(text) if is_html else text)


def as_read(page: str) -> str:
    """Return what a reader would see of an HTML page.

    Not html.parser: it takes quadratic time over pages made for that. Here whatever isn't closed ends the page.
    """
    seen, at = [], 0
    while (tag := TAG.search(page, at)) is not None:
        seen.append(page[at : tag.start()])
        name = tag["name"].lower()
        if name == "!--":
            at = page.find("-->", tag.end()) + 3
        elif name in UNSEEN:
            closed = UNSEEN[name].search(page, tag.end())
            at = page.find(">", closed.end()) + 1 if closed else 0
        else:
            seen.append("" if name in INLINE else " " if name in CELLS else "\n")
            at = page.find(">", tag.end()) + 1
        if at < tag.end():  # nothing closes it
            break
    else:
        seen.append(page[at:])
    text = html.unescape(LONG_REFERENCE.sub("\ufffd", "".join(seen)))
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "\n".join(line for line in lines if line)
