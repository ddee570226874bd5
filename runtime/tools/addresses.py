"""Which addresses the agent may connect to: those of the public internet, and no other.

A page that a model asks for may be chosen by whoever wrote the text it read. So nothing of the machine, of its network
or of its cloud provider may be reachable: neither by name, nor by a number in disguise, nor by a name that changes its
mind between the look-up and the connection.

Refuses to know what is fetched. `PublicResolver` looks a name up once and vets every address it gets;
`public_sockets` vets once more, right where the connection is made, so that no path leads around it.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable

from aiohttp.abc import AbstractResolver, ResolveResult

from runtime.errors import ToolError
from runtime.tools.special_addresses import find_carried_ipv4, is_special

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
IsAllowed = Callable[[Address], bool]


def is_public(address: Address) -> bool:
    """Whether an address, or the IPv4 address that it carries, belongs to the public internet."""
    if isinstance(address, ipaddress.IPv6Address) and (carried := find_carried_ipv4(address)) is not None:
        return not is_special(carried)
    return not is_special(address)


def require_public(address: str, is_allowed: IsAllowed = is_public) -> None:
    """Raise ToolError unless one may connect to this numeric address."""
    if not is_allowed(ipaddress.ip_address(address.partition("%")[0])):
        raise ToolError(f"{address} is not an address of the public internet: only such are fetched")


class PublicResolver(AbstractResolver):
    """Looks names up; a name with even one address that is not public is refused altogether."""

    def __init__(self, is_allowed: IsAllowed = is_public) -> None:
        self._is_allowed = is_allowed

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, family=family)
        results = [
            ResolveResult(
                hostname=host,
                host=sockaddr[0],
                port=port,
                family=kind,
                proto=proto,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for kind, _, proto, _, sockaddr in found
        ]
        for result in results:
            require_public(result["host"], self._is_allowed)
        return results

    async def close(self) -> None:
        return None


def public_sockets(is_allowed: IsAllowed = is_public) -> Callable[[tuple], socket.socket]:
    """Return what makes the sockets of a connector: none for an address that isn't allowed."""

    def open_socket(addr_info: tuple) -> socket.socket:
        family, kind, proto, _, sockaddr = addr_info
        require_public(sockaddr[0], is_allowed)
        return socket.socket(family, kind, proto)

    return open_socket
