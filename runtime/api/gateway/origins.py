"""ASGI middleware that protects the server from requests which foreign web pages send through a visitor's browser.

A page of another site can reach a server on the loopback in two ways: by DNS rebinding, where the page's own name
resolves to 127.0.0.1, or by a cross-site form, which needs no preflight. Therefore a request must name an allowed host;
a request that changes something must not come from a foreign origin, and its body must be JSON, which no form sends.
Invariant: a request rejected here has reached nothing else, not even authentication.
"""

from __future__ import annotations

import ipaddress
import re

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from runtime.api.errors import ApiError, BadRequest, Forbidden, Misdirected, UnsupportedMediaType, error_response
from runtime.api.gateway.permissions import LINKED_PATHS
from runtime.config import ServerConfig

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
EVERY_ADDRESS = frozenset({"", "0.0.0.0", "::"})
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
UPLOADS = "/v1/documents"
"""Below this path, a file may be uploaded as multipart/form-data."""
JSON_TYPE = re.compile(r"application/(?:(?:[a-z0-9.+-]+\+)?json|x-ndjson)", re.IGNORECASE)


class OriginCheck:
    """ASGI middleware outside authentication."""

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app = app
        self._config = config
        self._hosts = LOOPBACK_NAMES | {host.lower() for host in (config.host, *config.allowed_hosts) if host}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(scope["method"], scope["path"], Headers(scope=scope))
            except ApiError as error:
                await error_response(error, scope)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, method: str, path: str, headers: Headers) -> None:
        host = self._require_host(headers)
        # A feedback link is itself the permission, and its page sends a form.
        if method in SAFE_METHODS or path.startswith(LINKED_PATHS):
            return
        self._require_origin(host, headers)
        require_json(path, headers)

    def _require_host(self, headers: Headers) -> str:
        """Return the Host header, port included; empty if it is absent, which no browser does.

        Raises: BadRequest for several hosts; Misdirected for one that is not allowed.
        """
        named = headers.getlist("host")
        if len(named) > 1:
            raise BadRequest("the request names more than one host: send one Host header", code="invalid_host")
        host = named[0].lower() if named else ""
        # Without the port: a rebinding page's name has the server's own port.
        name = strip_port(host)
        if host and name not in self._hosts and not (self._config.host in EVERY_ADDRESS and is_address(name)):
            raise Misdirected(
                f"this server does not answer as {host[:200]!r}: use an address it listens on, or put that name into "
                "server.allowed_hosts",
                code="host_not_allowed",
            )
        return host

    def _require_origin(self, host: str, headers: Headers) -> None:
        """Raise Forbidden for a request of a foreign page."""
        # Browsers set both and pages cannot change them; some send only one of the two, so either may reject.
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if origin is not None and origin in self._config.cors_origins:
            return
        is_own = origin is None or origin.lower().partition("://")[2] == host
        if not is_own or site not in (None, "same-origin", "none"):
            raise Forbidden(
                f"pages of {(origin or 'other sites')[:200]!r} may not use this server: to allow one, put its origin "
                "into server.cors_origins",
                code="origin_not_allowed",
            )


def require_json(path: str, headers: Headers) -> None:
    """Raise UnsupportedMediaType for a body that is not JSON."""
    # The type of an empty body is ignored: clients send arbitrary ones.
    content_type = headers.get("content-type", "").partition(";")[0].strip()
    has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
    if JSON_TYPE.fullmatch(content_type) or not has_body:
        return
    if path.startswith(UPLOADS) and content_type.lower() == "multipart/form-data":
        return
    raise UnsupportedMediaType(
        f"the body is {content_type[:80]!r}, not JSON: send it with `Content-Type: application/json`",
        code="unsupported_media_type",
    )


def strip_port(host: str) -> str:
    """Return a Host header without its port; an IPv6 address also without its brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if ":" in host else host


def is_address(name: str) -> bool:
    """Return whether a host is an IP address. DNS rebinding needs a name, so that addresses are safe."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
