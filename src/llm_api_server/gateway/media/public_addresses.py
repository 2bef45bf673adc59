"""Addresses of the public internet, so that fetching an image reaches nothing inside. Pure.

The tables are IANA's special-purpose registries for IPv4 and IPv6 (RFC 6890 and its updates), and addresses that look
public and lead to the inside of a cloud. They are written out because `ipaddress.is_global` changes with the version
of Python and is true for 6to4 relays, AS112, NAT64, segment routing and multicast.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

_IPV4 = tuple(
    map(
        ip_network,
        (
            "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12",
            "192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16",
            "192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/3",
            "168.63.129.16/32",  # Azure's host
        ),
    )
)  # fmt: skip
#: Global unicast addresses are in this network ...
_IPV6_GLOBAL = ip_network("2000::/3")
#: ... except for protocols (Teredo among them), documentation, 6to4 and segment routing.
_IPV6 = tuple(map(ip_network, ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20", "2620:4f:8000::/48")))


def is_public(text: str) -> bool:
    """Return whether a numeric address belongs to the internet. An IPv4 address mapped to IPv6 is judged as IPv4."""
    try:
        address = ip_address(text)
    except ValueError:  # also an address with a zone: it belongs to a link of this machine
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _IPV4)
    return address in _IPV6_GLOBAL and not any(address in network for network in _IPV6)
