"""TLS of a port: its certificate and key as a context, and new ones in an old context."""

from __future__ import annotations

import ssl
from collections.abc import Iterable

from broker.config import Tls
from broker.errors import ConfigError


def context_of(tls: Tls | None, key: str) -> ssl.SSLContext | None:
    """A server's context with the files that `tls` names; None for a port without TLS.

    Raises:
        ConfigError: below `key`, naming the file that can't be used.
    """
    if tls is None:
        return None
    for name, path in (("certificate", tls.certificate), ("key", tls.key)):
        try:
            with open(path, "rb"):
                pass
        except OSError as error:
            raise ConfigError(f"{key}.{name}", f"{path} can't be read: {error.strerror}") from None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _load(context, tls, key)
    return context


def renew(ports: Iterable[tuple[ssl.SSLContext | None, Tls | None, str]]) -> None:
    """Read the files of all ports again, given as context, files and key, into their contexts:
    connections that come from now on get them.

    Raises:
        ConfigError: as `context_of` does; no context was changed.
    """
    served = [(context, tls, key) for context, tls, key in ports if context and tls]
    for _, tls, key in served:
        context_of(tls, key)  # a context that fails to load is left with half of it
    for context, tls, key in served:
        _load(context, tls, key)


def _load(context: ssl.SSLContext, tls: Tls, key: str) -> None:
    try:
        context.load_cert_chain(tls.certificate, tls.key, password=_no_password)
    except ssl.SSLError as error:
        reason = error.reason or "not PEM files that belong together"
        files = f"{tls.certificate} and {tls.key}"
        raise ConfigError(key, f"{files} can't be used as certificate and key: {reason}") from None


def _no_password() -> str:
    """Instead of asking for it on a terminal, which would block."""
    return ""
