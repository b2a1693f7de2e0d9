"""Which database holds the keys, in whatever way the URL says it."""

from __future__ import annotations

import asyncio

import pytest

from broker.redis_cluster import client_of

DATABASES = [
    ("redis://h", 0),
    ("redis://h/0", 0),
    ("rediss://h:7/3", 3),
    ("redis://h?db=4", 4),
    ("redis://h/3?db=4", 4),
    ("unix:///run/redis", 0),
    ("unix:///run/redis?db=5", 5),
    ("redis+sentinel://h/main", 0),
    ("redis+sentinel://h/main/6", 6),
    ("redis+cluster://h", 0),
]


def _nothing() -> None: ...


@pytest.mark.parametrize(("url", "database"), DATABASES)
def test_the_database_of_a_url(url: str, database: int) -> None:
    async def found() -> int:
        client = client_of(url, _nothing, _nothing, key_prefix="")
        try:
            return client.database
        finally:
            await client.close()

    assert asyncio.run(found()) == database
