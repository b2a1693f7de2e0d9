"""The functions `broker::*` about clients: who is connected, who is in a group, who has to go.

They tell of the clients of all gateways of the broker, one gateway after the other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Raw, Struct

from broker.errors import BrokerError, InvalidRequest
from broker.messages import Reply
from broker.names import Group
from broker.tasks import Tasks
from gateway.access import same_address
from gateway.hub import Subscription
from gateway.peers import Peers
from gateway.remote_workers import unavailable
from gateway.shard_links import Answer, Answered
from gateway.stream_calls import deserialization_error
from gateway.stream_port import DISCONNECTED_CODE, Client, StreamPort

PAGE_DEFAULT, PAGE_MAX = 100, 1000
SCAN_MAX = 10_000
"""Connections that one page looks at; where few match, a page may be short and not the last."""
SUBSCRIPTIONS_SHOWN_MAX = 100
CURSOR_MAX = 18  # digits
CHUNK = 500
"""Connections that are looked at in one turn of the loop."""

Limit = Annotated[int, Meta(ge=1, le=PAGE_MAX)]
CloseCode = Annotated[int, Meta(ge=3000, le=4999)]
Reason = Annotated[str, Meta(max_length=100)]

_encode = msgspec.json.encode
_Fields = dict[str, Any]


class _Match(Struct):
    """Which connections: all that is given has to match."""

    context: Any = None
    addr: str | None = None
    connection_id: str | None = None


class _Connections(_Match):
    limit: Limit = PAGE_DEFAULT
    cursor: str | None = None


class _Members(Struct):
    stream_name: str
    group_id: str
    id: str | None = None
    limit: Limit = PAGE_DEFAULT
    cursor: str | None = None


class _Disconnect(_Match):
    code: CloseCode = DISCONNECTED_CODE
    reason: Reason = "disconnected"


_Input = TypeVar("_Input")


class _Page(Struct):
    """What one gateway answers to `broker::connections` or `broker::members`."""

    cursor: str | None
    count: int
    connections: list[Raw] = []
    members: list[Raw] = []


class _Count(Struct):
    disconnected: int


class BrokerFunctions:
    """Answers calls from what the gateways of this broker know.

    Args:
        gateways: how many this broker has.
    """

    def __init__(self, port: StreamPort, gateway_id: str, peers: Peers, gateways: int) -> None:
        self._port = port
        self._peers = peers
        self._gateways = gateways
        self._prefix = gateway_id.partition("-")[0]
        self._tasks = Tasks()
        self._functions: dict[str, Callable[[bytes, Answered], None]] = {
            "broker::connections": self._connections,
            "broker::members": self._members,
            "broker::disconnect": self._disconnect,
        }
        self.disconnected_total = 0

    def extend(self, functions: dict[str, Callable[[bytes, Answered], None]]) -> None:
        """Answer these too."""
        self._functions |= functions

    def call(self, function_id: str, data: bytes, answered: Answered) -> bool:
        """Make a call; False when there is no such function. A result comes as a `Reply`."""
        if function_id not in self._functions:
            return False
        if self._gateways == 1:
            self.call_here(function_id, data, answered)
        else:
            self._tasks.start(self._call_all(function_id, data, answered))
        return True

    def call_here(self, function_id: str, data: bytes, answered: Answered) -> None:
        """Answer for the clients of this gateway alone."""
        try:
            self._functions[function_id](b"{}" if data == b"null" else data, answered)
        except BrokerError as refusal:
            answered(refusal)

    # All gateways.

    async def _call_all(self, function_id: str, data: bytes, answered: Answered) -> None:
        try:
            if function_id == "broker::disconnect":
                result = await self._disconnect_everywhere(function_id, data)
            else:
                result = await self._page(function_id, b"{}" if data == b"null" else data)
        except BrokerError as error:
            answered(error)
        else:
            answered(Reply(0, result))

    async def _page(self, function_id: str, data: bytes) -> bytes:
        """A page of what the gateways have, one after the other.

        Raises:
            BrokerError: the input can't be used, or a gateway did not answer.
        """
        query: _Members | _Connections
        if function_id == "broker::members":
            name, query = "members", _decode(function_id, data, _Members)
        else:
            name, query = "connections", _decode(function_id, data, _Connections)
        first, after = _place(query.cursor)
        fields = _query_fields.decode(data)
        found: list[Raw] = []
        count, cursor = 0, None
        gateways = sorted([self._peers.me.index, *(p.hello.index for p in self._peers.siblings())])
        for place in gateways:
            is_read = place >= first and len(found) < query.limit and cursor is None
            fields["limit"] = Raw(b"%d" % (query.limit - len(found) if is_read else 1))
            fields["cursor"] = Raw(_encode(str(after) if place == first else None))
            page = _page_decoder.decode(await self._ask(place, function_id, _encode(fields)))
            count += page.count
            if is_read:
                found += page.connections or page.members
                if page.cursor is not None:
                    cursor = f"{place}-{page.cursor}"
                elif len(found) == query.limit and place != gateways[-1]:
                    cursor = f"{place + 1}-0"
        return _encode({name: found, "cursor": cursor, "count": count})

    async def _disconnect_everywhere(self, function_id: str, data: bytes) -> bytes:
        """Raises: BrokerError when the input can't be used, or not all gateways were asked."""
        siblings = [peer.hello.index for peer in self._peers.siblings()]
        asked = [self._ask(place, function_id, data) for place in (self._peers.me.index, *siblings)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        if failed := [answer for answer in answers if isinstance(answer, BaseException)]:
            raise failed[0]
        if len(asked) < self._gateways:
            raise unavailable("", "not every gateway of the broker is linked")
        counts = [_count_decoder.decode(a) for a in answers if isinstance(a, bytes)]
        return _encode({"disconnected": sum(answer.disconnected for answer in counts)})

    async def _ask(self, place: int, function_id: str, data: bytes) -> bytes:
        """What the gateway at `place` answers.

        Raises:
            BrokerError: it refuses, or can't be asked.
        """
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        peers = {peer.hello.index: peer for peer in self._peers.siblings()}
        if place == self._peers.me.index:
            self.call_here(function_id, data, future.set_result)
        elif place in peers:
            peers[place].ask(function_id, data, future.set_result)
        else:
            raise unavailable(str(place), "it is not linked")
        answer = await future
        if isinstance(answer, BrokerError):
            raise answer
        assert isinstance(answer, Reply), "what these calls are answered with"
        assert answer.result is not None, "these calls have results"
        return answer.result

    # This gateway.

    def _connections(self, data: bytes, answered: Answered) -> None:
        query = _decode("broker::connections", data, _Connections)
        found: list[_Fields] = []
        last: int | None = None
        for client in islice(self._after(_number(query.cursor)), SCAN_MAX):
            if len(found) == query.limit:
                break
            last = client.number
            if self._matches(query, client):
                found.append(self._shown(client))
        more = last is not None and next(self._after(last), None) is not None
        answer = {
            "connections": found,
            "cursor": str(last) if more else None,
            "count": len(self._port.clients),
        }
        answered(Reply(0, _encode(answer)))

    def _members(self, data: bytes, answered: Answered) -> None:
        query = _decode("broker::members", data, _Members)
        members = self._port.hub.of_group(Group(query.stream_name, query.group_id))
        after = _number(query.cursor)
        found: list[_Fields] = []
        last: int | None = None
        for subscription in members:
            if subscription.number <= after or query.id not in (None, subscription.item_id):
                continue
            if len(found) == query.limit:
                break
            last = subscription.number
            found.append(self._member(subscription))
        else:
            last = None
        cursor = None if last is None else str(last)
        answer = {"members": found, "cursor": cursor, "count": len(members)}
        answered(Reply(0, _encode(answer)))

    def _disconnect(self, data: bytes, answered: Answered) -> None:
        query = _decode("broker::disconnect", data, _Disconnect)
        if query.context in (None, {}) and query.addr is None and query.connection_id is None:
            raise InvalidRequest(
                "INVALID_ARGUMENTS", "give context (with fields), addr or connection_id", "context"
            )
        self._tasks.start(self._disconnect_all(query, answered))

    async def _disconnect_all(self, query: _Disconnect, answered: Answered) -> None:
        """In pieces, up to whoever came last meanwhile."""
        count = last = 0
        while clients := list(islice(self._after(last), CHUNK)):
            last = clients[-1].number
            for client in clients:
                if self._matches(query, client):
                    client.disconnect(query.code, query.reason)
                    count += 1
            await asyncio.sleep(0)
        self.disconnected_total += count
        answered(Reply(0, _encode({"disconnected": count})))

    def _after(self, number: int) -> Iterator[Client]:
        """Connected clients in the order in which they came, from the one after `number`."""
        return (c for c in self._port.clients.values() if c.number > number)

    def _matches(self, query: _Match, client: Client) -> bool:
        if query.connection_id not in (None, self._id(client)):
            return False
        if query.addr is not None and not same_address(client.address, query.addr):
            return False
        return query.context is None or _context_matches(query.context, client.context)

    def _id(self, client: Client) -> str:
        return f"{self._prefix}-{client.number}"

    def _shown(self, client: Client) -> _Fields:
        return {
            "connection_id": self._id(client),
            "addr": client.address,
            "connected_at_ms": client.connected_at_ms,
            "expires_at": client.expires_at_ms,
            "context": Raw(client.context),
            "subscription_count": len(client.subscriptions),
            "subscriptions": [
                {
                    "subscription_id": s.subscription_id,
                    "stream_name": s.group.stream,
                    "group_id": s.group.group_id,
                    "id": s.item_id,
                }
                for s in client.subscriptions[:SUBSCRIPTIONS_SHOWN_MAX]
            ],
        }

    def _member(self, subscription: Subscription) -> _Fields:
        client = subscription.subscriber
        assert isinstance(client, Client)
        return {
            "connection_id": self._id(client),
            "addr": client.address,
            "subscription_id": subscription.subscription_id,
            "id": subscription.item_id,
            "context": Raw(client.context),
        }


def _number(cursor: str | None) -> int:
    """The number after which a page begins."""
    if cursor is None:
        return 0
    if not (cursor.isascii() and cursor.isdecimal()) or len(cursor) > CURSOR_MAX:
        raise InvalidRequest("INVALID_ARGUMENTS", "cursor is not one that was given", "cursor")
    return int(cursor)


def _place(cursor: str | None) -> tuple[int, int]:
    """The gateway at which a page begins, and the number after which it does there."""
    gateway, _, number = (cursor or "0-0").rpartition("-")
    return _number(gateway or "0"), _number(number)


_query_fields = msgspec.json.Decoder(dict[str, Raw])
_page_decoder = msgspec.json.Decoder(_Page)
_count_decoder = msgspec.json.Decoder(_Count)


def _decode(function_id: str, data: bytes, kind: type[_Input]) -> _Input:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as error:
        raise deserialization_error(function_id, error) from None


def _context_matches(wanted: Any, context: bytes) -> bool:
    """Whether the context has the fields of `wanted` with equal values, or is equal to it."""
    actual = msgspec.json.decode(context)
    if isinstance(wanted, dict) and isinstance(actual, dict):
        return all(key in actual and _same(value, actual[key]) for key, value in wanted.items())
    return _same(wanted, actual)


def _same(a: Any, b: Any) -> bool:
    """Whether two JSON values are equal; True is not 1."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(value, b[key]) for key, value in a.items())
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)
