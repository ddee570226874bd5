"""Restricts outgoing connections to public internet addresses, as a defence against server-side request forgery.

The URL that a model fetches may come from untrusted text. Therefore nothing on this machine, its network or its cloud
provider may be reachable: not by name, not by an encoded address, and not by a name whose resolution changes between
check and connection (DNS rebinding). Invariant: `PublicResolver` checks every resolved address; `public_socket_factory`
checks again at the connection itself, so that no code path bypasses the check.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable

from aiohttp import AddrInfoType
from aiohttp.abc import AbstractResolver, ResolveResult

from runtime.errors import ToolError
from runtime.tools.special_addresses import find_embedded_ipv4, is_special

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
IsAllowed = Callable[[Address], bool]


def is_public(address: Address) -> bool:
    """Return whether an address, or the IPv4 address embedded in it, belongs to the public internet."""
    if isinstance(address, ipaddress.IPv6Address) and (embedded := find_embedded_ipv4(address)) is not None:
        return not is_special(embedded)
    return not is_special(address)


def require_public(address: str, is_allowed: IsAllowed = is_public) -> None:
    """Raise ToolError unless connections to this numeric address are allowed."""
    # An IPv6 address may have a zone, `fe80::1%eth0`.
    if not is_allowed(ipaddress.ip_address(address.partition("%")[0])):
        raise ToolError(f"{address} is not an address of the public internet: only such are fetched")


class PublicResolver(AbstractResolver):
    """Resolves names; a name with even one address that is not public is rejected."""

    def __init__(self, is_allowed: IsAllowed = is_public) -> None:
        self._is_allowed = is_allowed

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        loop = asyncio.get_running_loop()
        address_infos = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, family=family)
        results = [
            ResolveResult(
                hostname=host,
                host=str(sockaddr[0]),
                port=port,
                family=kind,
                proto=proto,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for kind, _, proto, _, sockaddr in address_infos
        ]
        # All of them: aiohttp may connect to any.
        for result in results:
            require_public(result["host"], self._is_allowed)
        return results

    async def close(self) -> None:
        return None


def public_socket_factory(is_allowed: IsAllowed = is_public) -> Callable[[AddrInfoType], socket.socket]:
    """Return a socket factory for aiohttp's connector that raises ToolError for addresses that are not allowed."""

    def open_socket(addr_info: AddrInfoType) -> socket.socket:
        # Also for literal addresses, which aiohttp does not pass to its resolver.
        family, kind, proto, _, sockaddr = addr_info
        require_public(str(sockaddr[0]), is_allowed)
        return socket.socket(family, kind, proto)

    return open_socket
