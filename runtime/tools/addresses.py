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

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
IsAllowed = Callable[[Address], bool]

METADATA = frozenset({ipaddress.ip_address("168.63.129.16")})  # public by its number, but Azure's own to its machines
CARRIERS = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("::/96"))  # NAT64; "IPv4-compatible"
NOT_PUBLIC = (ipaddress.ip_network("64:ff9b:1::/48"), ipaddress.ip_network("fec0::/10"))  # local NAT64; site-local


def is_public(address: Address) -> bool:
    """Whether an address, and any IPv4 address that it carries, belongs to the public internet."""
    if isinstance(address, ipaddress.IPv6Address):
        if any(address in network for network in NOT_PUBLIC):
            return False
        if (carried := _carried_ipv4(address)) is not None:
            return is_public(carried)
    return address.is_global and not (
        address.is_multicast or address.is_reserved or address.is_unspecified or address in METADATA
    )


def _carried_ipv4(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """Return the IPv4 address that packets to this one end up at, if so."""
    if any(address in network for network in CARRIERS):
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour


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
