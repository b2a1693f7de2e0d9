"""What `broker copy` asks of the places that it copies from and to."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import NamedTuple, Protocol, Self

from broker.names import Group

PAGE = 500
"""Items that are carried at a time."""

Item = tuple[str, bytes]
"""An item's id and the JSON text of its value."""
Put = Callable[[list[Item]], Awaitable[None]]


class GroupHead(NamedTuple):
    """Where a group's numbering is."""

    group: Group
    epoch: str
    seq: int
    timestamp_ms: int


class Source(Protocol):
    """Data that is read; nobody changes it while it is entered.

    Raises (every method):
        ConfigError: the place can't be used, or is in use.
        StorageError: something can't be read.
    """

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *_: object) -> None: ...

    async def names(self) -> list[Group]:
        """All groups, also those without items whose numbering is kept, in any order."""

    async def head(self, group: Group) -> GroupHead:
        """The head of a group; a new epoch where it has none."""

    def items(self, group: Group) -> AsyncIterator[list[Item]]:
        """Its items in order of first insertion, page by page."""


class Target(Protocol):
    """A place that is written; `begin` first, `finish` last. Raises as `Source` does."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *_: object) -> None: ...

    async def begin(self, is_replacing: bool, source: Source) -> None:
        """Get ready.

        Raises:
            ConfigError: there is data and it may not be replaced, or it is the source's.
        """

    def group(self, head: GroupHead) -> AbstractAsyncContextManager[Put]:
        """Make a group; what is entered takes its items."""

    async def written(self) -> None:
        """Everything was given."""

    def copy(self) -> Source:
        """What was written, to be read back."""

    async def finish(self) -> None:
        """It is right: from now on it counts."""
