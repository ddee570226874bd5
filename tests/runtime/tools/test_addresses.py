"""Public addresses: IANA's registries block by block, and every spelling of an internal address."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import socket

import pytest

from runtime.tools.addresses import is_public
from runtime.tools.base import run_tool
from runtime.tools.special_addresses import ADDITIONS, IANA_IPV4, IANA_IPV6
from runtime.tools.web import page_fetcher
from tests.runtime.tools.test_web import watch_connections
from tests.support.shared_data import read_shared_rows

# Rows of the registries, each as IANA names it; every row is within a block of the table.
_REGISTRY = """
0.0.0.0/8 0.0.0.0/32 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.0.0/29
192.0.0.8/32 192.0.0.9/32 192.0.0.10/32 192.0.0.170/32 192.0.0.171/32 192.0.2.0/24 192.31.196.0/24 192.52.193.0/24
192.88.99.0/24 192.88.99.2/32 192.168.0.0/16 192.175.48.0/24 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 240.0.0.0/4
255.255.255.255/32 ::1/128 ::/128 64:ff9b:1::/48 100::/64 100:0:0:1::/64 2001::/23 2001::/32 2001:1::1/128
2001:1::2/128 2001:1::3/128 2001:2::/48 2001:3::/32 2001:4:112::/48 2001:10::/28 2001:20::/28 2001:30::/28
2001:db8::/32 2620:4f:8000::/48 3fff::/20 5f00::/16 fc00::/7 fe80::/10
"""
REGISTRY = _REGISTRY.split()
NEIGHBOURS = [
    *("1.1.1.1", "9.255.255.255", "11.0.0.0", "192.0.1.0", "192.88.98.255", "192.88.100.0", "223.255.255.255"),
    *("2001:200::", "2620:4f:7fff::1", "3ffe:ffff::1", "2606:4700::6810:84e5", "::ffff:8.8.8.8", "2002:808:808::1"),
]
MET_BY_AN_ATTACKER = ["192.0.0.192", "192.0.0.8", "192.88.99.1", "3fff::1"]


@pytest.mark.parametrize("block", [*REGISTRY, *IANA_IPV4, *IANA_IPV6, *ADDITIONS])
def test_both_ends_of_every_special_block_are_refused(block: str):
    network = ipaddress.ip_network(block)
    assert not is_public(network[0]) and not is_public(network[-1])


@pytest.mark.parametrize("block", [*IANA_IPV4, *(it for it in ADDITIONS if "." in it)])
@pytest.mark.parametrize("carrier", ["::ffff:{}", "64:ff9b::{}", "::{}"])
def test_a_special_ipv4_address_is_refused_in_an_ipv6_one(block: str, carrier: str):
    for end in (ipaddress.ip_network(block)[0], ipaddress.ip_network(block)[-1]):
        assert not is_public(ipaddress.ip_address(carrier.format(end)))
        assert not is_public(ipaddress.IPv6Address((0x2002 << 112) | (int(end) << 80)))


@pytest.mark.parametrize("address", MET_BY_AN_ATTACKER)
async def test_no_special_address_is_connected_to(address: str, monkeypatch):
    connected = watch_connections(monkeypatch)
    host = f"[{address}]" if ":" in address else address
    result = await run_tool(page_fetcher(), json.dumps({"url": f"http://{host}/"}))
    assert "is not an address of the public internet" in result.error and connected == []


@pytest.mark.parametrize("address", ["4000::1", "1fff::1", "8000::1"])
def test_ipv6_that_was_never_given_out_is_refused(address: str):
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address",
    NEIGHBOURS,
)
def test_the_neighbours_of_special_blocks_are_public(address: str):
    assert is_public(ipaddress.ip_address(address))


async def test_no_url_of_the_public_corpus_reaches_an_inside_address(monkeypatch):
    rows = read_shared_rows("security_ssrf/ssrf_payloads.jsonl")
    kinds = {"internal_ip", "internal_name", "parser_trick", "scheme", "resolves_internal"}
    urls = [row["payload"] for row in rows if row["kind"] in kinds]
    assert len(urls) > 80

    async def getaddrinfo(host, port, **_):
        """Parse numeric addresses in any spelling as the system does; every name resolves to the loopback."""
        try:
            return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        except socket.gaierror:
            return [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("127.0.0.1", port))]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    connected = watch_connections(monkeypatch)
    fetched = [url for url in urls if (await run_tool(page_fetcher(), json.dumps({"url": url}))).error is None]
    assert (fetched, connected) == ([], [])
