"""Addresses as they are written, and as they are meant."""

from __future__ import annotations

import pytest
from websockets.datastructures import Headers

from gateway.access import Proxies, origin_plausible, same_address, token_given


@pytest.mark.parametrize(
    ("address", "wanted", "same"),
    [
        ("127.0.0.1:80", "127.0.0.1:80", True),
        ("127.0.0.1:80", "127.0.0.1", True),
        ("127.0.0.1:80", "127.0.0.1:81", False),
        ("127.0.0.1:80", "127.0.0.2", False),
        ("[::1]:80", "::1", True),
        ("[::1]:80", "[::1]", True),
        ("[::1]:80", "0:0:0:0:0:0:0:1", True),
        ("[::ffff:10.0.0.1]:80", "10.0.0.1", True),
        ("203.0.113.9", "203.0.113.9", True),
        ("", "", True),
        ("127.0.0.1:80", "", False),
        ("unknown", "127.0.0.1", False),
        ("unknown", "other", False),
    ],
)
def test_same_address(address: str, wanted: str, same: bool) -> None:
    assert same_address(address, wanted) is same


def test_a_page_may_ask_its_own_host_by_address() -> None:
    """The page and the broker are on one machine, which the request names by its address."""
    headers = Headers({"Host": "192.0.2.7:3112", "Origin": "http://192.0.2.7:8080"})
    assert origin_plausible(headers, "192.0.2.7:3112")
    headers = Headers({"Host": "192.0.2.7:3112", "Origin": "https://evil.example"})
    assert not origin_plausible(headers, "192.0.2.7:3112")
    assert origin_plausible(headers, "10.0.0.1:3112")  # the broker of another machine
    assert not origin_plausible(
        Headers({"Host": "[2001:db8::1]", "Origin": "x"}), "[2001:db8::1]:1"
    )


def test_a_chain_of_proxies() -> None:
    proxies = Proxies(["10.0.0.0/8", "::1"])
    headers = Headers()
    headers["X-Forwarded-For"] = "1.1.1.1, 2.2.2.2"
    headers["X-Forwarded-For"] = "10.9.9.9 ,10.8.8.8"
    assert proxies.client_address(headers, "[::1]:5") == "2.2.2.2"
    assert proxies.client_address(headers, "3.3.3.3:5") == "3.3.3.3:5"
    assert proxies.client_address(Headers(), "[::1]:5") == "[::1]:5"
    assert Proxies([]).client_address(headers, "[::1]:5") == "[::1]:5"


@pytest.mark.parametrize(
    ("values", "given"),
    [
        (["Bearer t"], True),
        (["bearer  t "], True),
        (["Bearer T"], False),
        (["Basic t"], False),
        (["t"], False),
        (["Bearer"], False),
        ([], False),
        (["Bearer t", "Bearer t"], False),
        (["Bearer \u00e9"], False),
    ],
)
def test_token_given(values: list[str], given: bool) -> None:
    headers = Headers()
    for value in values:
        headers["Authorization"] = value
    assert token_given(headers, "t") is given
