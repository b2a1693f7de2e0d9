"""The Redis of the storage tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.redis_server import IS_INSTALLED, RedisServer


@pytest.fixture(scope="session")
def common_redis() -> Iterator[RedisServer]:
    if not IS_INSTALLED:
        pytest.skip("redis-server is not installed")
    with RedisServer() as server:
        yield server


@pytest.fixture
def redis_server(common_redis: RedisServer) -> RedisServer:
    """A Redis with nothing in it."""
    common_redis.client.flushall()
    return common_redis
