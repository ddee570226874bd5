"""The address blocks outside the public internet: IANA's two special-purpose registries and a few additions.

Sources: every row of the IANA IPv4 and IPv6 Special-Purpose Address Registries (RFC 6890 and its updates), including
the few that IANA calls globally reachable, which are anycast services of protocols (AS112, AMT, TURN, PCP), never web
sites. Additions: multicast, the deprecated site-local and IPv4-compatible blocks, and services of cloud providers.
IPv6 blocks in `EMBEDDING_BLOCKS` are classified by the IPv4 address that packets to them reach.
"""

from __future__ import annotations

import ipaddress

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

IANA_IPV4 = {
    "0.0.0.0/8": "this network",
    "10.0.0.0/8": "private use",
    "100.64.0.0/10": "shared address space of carriers",
    "127.0.0.0/8": "loopback",
    "169.254.0.0/16": "link-local, metadata of clouds among it",
    "172.16.0.0/12": "private use",
    "192.0.0.0/24": "IETF protocol assignments, 192.0.0.0/29, .8, .9, .10, .170 and .171 among them",
    "192.0.2.0/24": "documentation (TEST-NET-1)",
    "192.31.196.0/24": "AS112-v4",
    "192.52.193.0/24": "AMT",
    "192.88.99.0/24": "deprecated 6to4 relay anycast, 6a44 among it",
    "192.168.0.0/16": "private use",
    "192.175.48.0/24": "direct delegation AS112 service",
    "198.18.0.0/15": "benchmarking",
    "198.51.100.0/24": "documentation (TEST-NET-2)",
    "203.0.113.0/24": "documentation (TEST-NET-3)",
    "240.0.0.0/4": "reserved, limited broadcast among it",
}
IANA_IPV6 = {
    "::1/128": "loopback",
    "::/128": "unspecified",
    "64:ff9b:1::/48": "IPv4/IPv6 translation of local use",
    "100::/64": "discard only",
    "100:0:0:1::/64": "dummy prefix",
    "2001::/23": "IETF protocol assignments: Teredo, benchmarking, AMT, AS112-v6, ORCHIDv2, DRIP among them",
    "2001:db8::/32": "documentation",
    "2620:4f:8000::/48": "direct delegation AS112 service",
    "3fff::/20": "documentation",
    "5f00::/16": "segment routing (SRv6) SIDs",
    "fc00::/7": "unique-local",
    "fe80::/10": "link-local",
}
ADDITIONS = {
    "224.0.0.0/4": "multicast",
    "168.63.129.16/32": "Azure's own services to its machines, public by its number",
    "ff00::/8": "multicast",
    "fec0::/10": "deprecated site-local",
}
EMBEDDING_BLOCKS: dict[str, int] = {
    "::ffff:0:0/96": 0,  # IPv4-mapped
    "64:ff9b::/96": 0,  # NAT64
    "2002::/16": 80,  # 6to4
    "::/96": 0,  # IPv4-compatible, deprecated
}
"""IPv6 blocks that embed an IPv4 address -> number of bits to the right of it."""

GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
"""The only block from which IANA allocates IPv6 addresses; everything else is reserved."""

_NOT_PUBLIC = [ipaddress.ip_network(block) for table in (IANA_IPV4, IANA_IPV6, ADDITIONS) for block in table]
_NOT_PUBLIC_OF = {version: [it for it in _NOT_PUBLIC if it.version == version] for version in (4, 6)}
_EMBEDDING = [(ipaddress.IPv6Network(block), shift) for block, shift in EMBEDDING_BLOCKS.items()]


def is_special(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Return whether an address is in a block outside the public internet."""
    if any(address in network for network in _NOT_PUBLIC_OF[address.version]):
        return True
    return isinstance(address, ipaddress.IPv6Address) and address not in GLOBAL_UNICAST


def find_embedded_ipv4(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """Return the IPv4 address that packets to this IPv6 address reach; None if it embeds none."""
    # `::1` and `::` match `::/96` too; they become 0.0.0.1 and 0.0.0.0, which are special as well.
    for network, shift in _EMBEDDING:
        if address in network:
            return ipaddress.IPv4Address(int(address) >> shift & 0xFFFFFFFF)
    return None
