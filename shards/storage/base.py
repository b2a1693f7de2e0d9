"""What a shard asks of a storage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from broker.errors import StorageError
from shards.group import GroupState, Operation, Outcome

Settled = tuple[Outcome | StorageError, GroupState | None]
"""What came of an operation, and the group that it was asked of (None when storage failed)."""

Settle = Callable[[Sequence[Settled]], None]
"""Takes one `Settled` per operation, in their order."""


class Storage(Protocol):
    """Keeps the groups of one shard.

    The caller has at most one `execute` under way per stream; streams are independent.
    """

    async def open(self) -> None:
        """Get ready.

        Raises:
            ConfigError: what the configuration names cannot be used.
        """

    async def close(self) -> None:
        """Let go of everything; whatever was settled is kept."""

    def execute(self, stream: str, operations: Sequence[Operation], settle: Settle) -> None:
        """Perform `operations` on groups of `stream`, one after the other.

        `settle` is called once, at once or later, when every change among them is durable. An
        operation that failed with a `StorageError` changed nothing. Reads see the operations
        before them and nothing that is not durable when they are settled.
        """

    def interest(self, stream: str, group_id: str, wanted: bool) -> None:
        """Tell what others change in a group, from what was last settled of it on; or not."""

    def interest_stream(self, stream: str, wanted: bool) -> None:
        """Tell what others change in any group of a stream that this shard owns; or not."""

    async def streams(self) -> list[str]:
        """The streams that may have groups, in any order."""

    async def groups(self, stream: str) -> list[str]:
        """The groups of `stream` that have items, in any order.

        Raises:
            StorageError: they could not be read.
        """
