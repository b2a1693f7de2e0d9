"""Who may open a connection, and where it comes from: origins, tokens, proxies. No I/O."""

from __future__ import annotations

import hmac
from collections.abc import Collection, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from urllib.parse import urlsplit

from websockets.datastructures import Headers

_Address = IPv4Address | IPv6Address


def origin_allowed(headers: Headers, allowed: Collection[str]) -> bool:
    """Whether the page that a handshake comes from may connect; programs send no `Origin`."""
    origins = headers.get_all("Origin")
    return not origins or "*" in allowed or (len(origins) == 1 and origins[0] in allowed)


def origin_plausible(headers: Headers, local_address: str) -> bool:
    """What holds where no origins are configured: a page is refused that asks for a broker on the
    very machine that it is shown on, unless it comes from that machine.

    Any page of the web can do so, whatever firewall there is. Whether a handshake does can be
    told by its `Host`, which no page can choose freely: a loopback name, or `local_address`.
    """
    origins = headers.get_all("Origin")
    if not origins:
        return True
    host = _url_host("//" + ",".join(headers.get_all("Host")))
    if not _is_loopback(host) and host != host_of(local_address):
        return True
    if len(origins) > 1:
        return False
    origin = _url_host(origins[0])
    return origins[0] == "file://" or _is_loopback(origin) or origin == host != ""


def token_given(headers: Headers, token: str) -> bool:
    """Whether `Authorization: Bearer` has the token; takes the same time for any wrong one."""
    given = headers.get_all("Authorization")
    scheme, _, value = given[0].partition(" ") if len(given) == 1 else ("", "", "")
    same = hmac.compare_digest(value.strip().encode(), token.encode())
    return same and scheme.lower() == "bearer"


class Proxies:
    """The proxies whose word is taken for where a connection comes from."""

    def __init__(self, networks: Sequence[str]) -> None:
        """`networks`: addresses, or networks such as `10.0.0.0/8`."""
        self._networks: list[IPv4Network | IPv6Network] = [ip_network(n) for n in networks]

    def client_address(self, headers: Headers, peer: str) -> str:
        """The address of the client behind `peer`, the socket's peer with its port.

        That is the last entry of `X-Forwarded-For` that no trusted proxy is; what stands before
        it anybody may have written.
        """
        address = peer
        if self._trusts(address):
            lines = headers.get_all("X-Forwarded-For")
            hops = [hop.strip() for line in lines for hop in line.split(",")]
            while hops and self._trusts(address) and _address_of(hops[-1]) is not None:
                address = hops.pop()
        return address

    def _trusts(self, address: str) -> bool:
        parsed = _address_of(address)
        return parsed is not None and any(parsed in network for network in self._networks)


def same_address(address: str, wanted: str) -> bool:
    """Whether `address` is `wanted`, which may have a port or not."""
    if address == wanted:
        return True
    has_port = host_of(wanted) != wanted.strip("[]")
    return not has_port and _address_of(wanted) == _address_of(address) is not None


def host_of(address: str) -> str:
    """`address`, which may have a port, without it and without brackets."""
    if address.startswith("["):
        return address[1:].partition("]")[0]
    return address.partition(":")[0] if address.count(":") == 1 else address


def _address_of(text: str) -> _Address | None:
    try:
        address = ip_address(host_of(text))
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _url_host(url: str) -> str:
    """The host of a URL in lower case; "" where there is none."""
    try:
        return (urlsplit(url).hostname or "").removesuffix(".")
    except ValueError:
        return ""


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    address = _address_of(host)
    return address is not None and (address.is_loopback or address.is_unspecified)
