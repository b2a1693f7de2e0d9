"""The Redis of the storage tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.redis_cluster import RedisClusterServers
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


@pytest.fixture(scope="session")
def common_cluster() -> Iterator[RedisClusterServers]:
    if not IS_INSTALLED:
        pytest.skip("redis-server is not installed")
    with RedisClusterServers() as servers:
        yield servers


@pytest.fixture
def redis_cluster(common_cluster: RedisClusterServers) -> RedisClusterServers:
    """A Redis Cluster with nothing in it."""
    common_cluster.flush()
    return common_cluster
