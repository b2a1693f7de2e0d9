"""What `redis_url` may hold. Pure: no I/O.

    redis://[USER:PASSWORD@]HOST[:PORT][/DB][?OPTION=VALUE&…]      one server; rediss:// with TLS
    unix://[USER:PASSWORD@]/PATH[?OPTION=VALUE&…]
    redis+sentinel://[USER:PASSWORD@]HOST[:PORT][,HOST[:PORT]…]/SERVICE[/DB]
                     [?sentinel_username=…&sentinel_password=…]    the master of a service
    redis+cluster://[USER:PASSWORD@]HOST[:PORT][,HOST[:PORT]…]     nodes to begin with

The last two with `rediss+` for TLS.
"""

from __future__ import annotations

from typing import Literal, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

REDIS_PORT = 6379
SENTINEL_PORT = 26379


class RedisUrl(NamedTuple):
    """The parts of a URL.

    hosts: of servers, Sentinels or nodes; none with a Unix socket.
    service: of the Sentinels.
    options: what the URL gives besides, by name.
    """

    text: str
    kind: Literal["server", "sentinel", "cluster"]
    hosts: tuple[tuple[str, int], ...]
    username: str | None = None
    password: str | None = None
    tls: bool = False
    service: str = ""
    db: int = 0
    options: tuple[tuple[str, str], ...] = ()

    @property
    def address(self) -> str:
        """What it names, without secrets."""
        if not self.hosts:
            return urlsplit(self.text).path
        shown = ",".join(shown_address(*host) for host in self.hosts)
        return f"{self.service} of {shown}" if self.service else shown


def shown_address(host: str, port: int) -> str:
    """HOST:PORT, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse(url: str) -> RedisUrl:
    """The parts of `url`.

    Raises:
        ValueError: it is none; the text says what is wrong and holds no secret.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        raise ValueError("it has no scheme")
    match scheme:
        case "unix":
            if not rest:
                raise ValueError("it names no path")
            return RedisUrl(url, "server", ())
        case "redis" | "rediss":
            parts = urlsplit(url)
            if parts.port == 0:
                raise ValueError("the port is 0")
            host = parts.hostname or "localhost"
            return RedisUrl(url, "server", ((host, parts.port or REDIS_PORT),))
        case "redis+sentinel" | "rediss+sentinel":
            return _several(url, "sentinel")
        case "redis+cluster" | "rediss+cluster":
            return _several(url, "cluster")
    raise ValueError(f"the scheme {scheme[:30]!r} is not known")


def _several(url: str, kind: Literal["sentinel", "cluster"]) -> RedisUrl:
    scheme, _, rest = url.partition("://")
    place, _, query = rest.partition("?")
    authority, _, path = place.partition("/")
    credentials, _, hosts = authority.rpartition("@")
    username, _, password = credentials.partition(":")
    default_port = SENTINEL_PORT if kind == "sentinel" else REDIS_PORT
    found = tuple(_host(text, default_port) for text in hosts.split(","))
    service, _, db = path.partition("/")
    options = dict(parse_qsl(query, strict_parsing=True)) if query else {}
    known = {"sentinel_username", "sentinel_password"} if kind == "sentinel" else set()
    if unknown := sorted(options.keys() - known):
        raise ValueError(f"the option {unknown[0][:30]!r} is not known")
    if kind == "sentinel" and not service:
        raise ValueError("it names no service: …/SERVICE")
    if kind == "cluster" and path:
        raise ValueError("a cluster has no databases: nothing may follow the hosts")
    if db and not db.isdecimal():
        raise ValueError("the database is no number")
    return RedisUrl(
        url,
        kind,
        found,
        unquote(username) or None,
        unquote(password) or None,
        scheme.startswith("rediss"),
        unquote(service),
        int(db or 0),
        tuple(options.items()),
    )


def _host(text: str, default_port: int) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    if not parts.hostname or parts.path or parts.username is not None:
        raise ValueError("a host is missing")
    if parts.port == 0:
        raise ValueError("a port is 0")
    return parts.hostname, parts.port or default_port
