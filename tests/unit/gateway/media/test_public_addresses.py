"""Addresses of this machine, its network, its cloud or a special-purpose registry are never public."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_api_server.gateway.media.public_addresses import is_public

INSIDE = """
    0.0.0.0 0.1.2.3 10.0.0.1 10.255.255.255 100.64.0.1 100.127.255.254 127.0.0.1 127.255.255.254 169.254.169.254
    169.254.170.2 172.16.0.1 172.31.255.255 192.0.0.1 192.0.0.170 192.0.0.192 192.0.2.1 192.31.196.1 192.52.193.1
    192.88.99.1 192.168.0.1 192.168.255.255 192.175.48.1 198.18.0.1 198.19.255.255 198.51.100.7 203.0.113.9 224.0.0.1
    239.255.255.250 240.0.0.1 255.255.255.255 168.63.129.16
    :: ::1 ::2 ::127.0.0.1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:169.254.169.254 ::ffff:7f00:1 ::ffff:0:127.0.0.1
    64:ff9b::7f00:1 64:ff9b::8.8.8.8 64:ff9b:1::1 100::1 100:0:0:1::1 2001::1 2001:0:7f00:1:: 2001:1::1 2001:2::1
    2001:10::1 2001:20::1 2001:db8::1 2002:7f00:1:: 2002:a00:1:: 2620:4f:8000::1 3fff::1 5f00::1 fc00::1 fd00:ec2::254
    fd12:3456::1 fe80::1 fe80::1%eth0 febf::1 fec0::1 ff02::1 ff0e::1
    0177.0.0.1 0x7f000001 2130706433 127.1 localhost
"""
OUTSIDE = "1.1.1.1 8.8.8.8 93.184.216.34 172.32.0.1 100.128.0.1 2606:4700::1111 2a00:1450:4001:830::200e ::ffff:8.8.8.8"


@pytest.mark.parametrize("address", INSIDE.split())
def test_special_purpose_addresses_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", OUTSIDE.split())
def test_addresses_of_the_internet_are_public(address: str) -> None:
    assert is_public(address)


@given(st.integers(0, 2**32 - 1).map(IPv4Address))
def test_a_mapped_address_is_judged_like_the_plain_one(address: IPv4Address) -> None:
    assert is_public(str(address)) == is_public(f"::ffff:{address}")
    assert not is_public(str(address)) or address.is_global


@given(st.integers(0, 2**128 - 1).map(IPv6Address))
def test_every_public_address_is_global(address: IPv6Address) -> None:
    assert not is_public(str(address)) or (address.is_global and not address.is_multicast)
