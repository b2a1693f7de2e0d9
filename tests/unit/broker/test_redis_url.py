"""What `redis_url` may hold."""

from __future__ import annotations

import pytest

from broker.redis_url import parse


def test_one_server() -> None:
    assert parse("redis://h").hosts == (("h", 6379),)
    assert parse("rediss://user:s3cret@[::1]:7000/2").address == "[::1]:7000"
    assert parse("unix:///run/redis.sock").address == "/run/redis.sock"
    assert parse("redis://h").kind == "server"


def test_sentinels() -> None:
    url = parse("rediss+sentinel://me:p%40ss@a:1,b,[::1]:3/main/4?sentinel_password=x%26y")
    assert url.kind == "sentinel"
    assert url.hosts == (("a", 1), ("b", 26379), ("::1", 3))
    assert (url.username, url.password, url.tls) == ("me", "p@ss", True)
    assert (url.service, url.db) == ("main", 4)
    assert url.options == (("sentinel_password", "x&y"),)
    assert url.address == "main of a:1,b:26379,[::1]:3"


def test_a_cluster() -> None:
    url = parse("redis+cluster://:s3cret@a:1,b")
    assert (url.kind, url.hosts, url.tls) == ("cluster", (("a", 1), ("b", 6379)), False)
    assert (url.username, url.password) == (None, "s3cret")
    assert url.address == "a:1,b:6379"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "h:1",
        "http://h",
        "unix://",
        "redis://h:0",
        "redis://h:99999",
        "redis://[::1",
        "redis+sentinel://h",
        "redis+sentinel://h/",
        "redis+sentinel://h/main/x",
        "redis+sentinel://h/main?nope=s3cret",
        "redis+sentinel:///main",
        "redis+cluster://",
        "redis+cluster://:s3cret@",
        "redis+cluster://a,,b",
        "redis+cluster://a:0",
        "redis+cluster://a/1",
        "redis+cluster://a?x=1",
        "redis+other://a",
    ],
)
def test_what_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        parse(url)
    assert "s3cret" not in str(error.value)
