"""The errors that callers, clients and operators see, each with a stable code."""

from __future__ import annotations


class BrokerError(Exception):
    """An error with a code for programs and a message for people.

    Args:
        code: stable, one per kind of fault; goes over the wire as it is.
        message: one sentence that names the field or thing at fault and the reason.
        field: the field of the input that is at fault, as the sender spelled it.
        retryable: whether the same call may succeed later without a change.
    """

    def __init__(
        self, code: str, message: str, field: str | None = None, retryable: bool = False
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.field = field
        self.retryable = retryable


class InvalidRequest(BrokerError):
    """The input is not of the right form; the same input will never be accepted."""


class LimitExceeded(BrokerError):
    """The input, or the state that it asks for, is beyond a configured bound."""


class ShardUnavailable(BrokerError):
    """The shard that owns the group does not answer; nothing is known of the call's effect."""

    def __init__(self, shard: int, reason: str) -> None:
        super().__init__(
            "shard_unavailable",
            f"shard {shard} is unavailable ({reason}); retry later",
            retryable=True,
        )
        self.shard = shard


class StorageError(BrokerError):
    """The storage refused or failed; a write that got this error is not stored."""


class ProtocolError(BrokerError):
    """The peer broke a protocol in a way that ends its connection."""


class ConfigError(Exception):
    """A configuration that cannot be used, or an address or file that it names and is taken.

    Args:
        path: the key's path, such as `modules[0].config.port`.
        message: what the key holds and what it may hold, in one line.
    """

    def __init__(self, path: str, message: str) -> None:
        super().__init__(f"{path}: {message}" if path else message)
        self.path = path
