"""The functions `broker::status` and `broker::top`: how the broker is, and what is used most.

What shards know is asked of them. Gateways tell each shard every few seconds how they are, so that
whichever gateway is asked can tell of all.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, Struct

from broker import messages
from broker.errors import BrokerError
from broker.hot import Hot
from broker.messages import Reply
from broker.metrics import VERSION
from broker.report import (
    TOP_MAX,
    GatewayReport,
    HotGroup,
    HotStream,
    ProcessReport,
    ShardReport,
    ShardTop,
    StatusReport,
    TopReport,
)
from broker.tasks import Tasks
from gateway.hub import Hub
from gateway.shard_links import Answer, Answered, ShardLinks
from gateway.stream_calls import deserialization_error

ANSWER_S = 2.0
"""How long a shard may take; then it is told of as one that does not answer."""
TELL_INTERVAL_S = 2.0

_encode = msgspec.json.encode
_shard_report = msgspec.json.Decoder(ShardReport)
_shard_top = msgspec.json.Decoder(ShardTop)

_Ask = Callable[[int], messages.Message]
_Input = TypeVar("_Input")


class _Status(Struct):
    pass


class _Top(Struct):
    limit: Annotated[int, Meta(ge=1, le=TOP_MAX)] = 10


class Introspection:
    """Answers for the whole broker.

    Args:
        report: of this gateway.
        deliveries: frames to clients by group.
        not_ready: why not everything works.
    """

    def __init__(
        self,
        gateway_id: str,
        links: ShardLinks,
        hub: Hub,
        *,
        report: Callable[[], GatewayReport],
        deliveries: Hot[tuple[str, str]],
        not_ready: Callable[[], list[str]],
    ) -> None:
        self._gateway_id = gateway_id
        self._links = links
        self._hub = hub
        self._report = report
        self._deliveries = deliveries
        self._not_ready = not_ready
        self._tasks = Tasks()
        self.functions: dict[str, Callable[[bytes, Answered], None]] = {
            "broker::status": self._status,
            "broker::top": self._top,
        }

    async def tell_shards(self) -> None:
        """Tell every shard how this gateway is, until cancelled."""
        while True:
            payload = _encode(self._report())
            for link in self._links.links:
                link.tell(messages.GatewayTells(payload))
            await asyncio.sleep(TELL_INTERVAL_S)

    def _status(self, data: bytes, answered: Answered) -> None:
        _decode("broker::status", data, _Status)
        self._tasks.start(self._answer_status(answered))

    def _top(self, data: bytes, answered: Answered) -> None:
        limit = _decode("broker::top", data, _Top).limit
        self._tasks.start(self._answer_top(limit, answered))

    async def _answer_status(self, answered: Answered) -> None:
        found = await self._ask_each(messages.AskStatus)
        shards = [
            _shard_report.decode(answer)
            if isinstance(answer, bytes)
            else ShardReport(ProcessReport(f"shard-{shard}", "down", answer), shard)
            for shard, answer in enumerate(found)
        ]
        gateways = {self._gateway_id: self._report()}
        for shard in shards:
            for gateway in shard.gateways:
                gateways.setdefault(gateway.gateway_id, gateway)
            shard.gateways = []
        reasons = self._not_ready()
        report = StatusReport(
            VERSION,
            _now_ms(),
            self._gateway_id,
            not reasons,
            reasons,
            sorted(gateways.values(), key=lambda gateway: gateway.about.process),
            shards,
        )
        answered(Reply(0, _encode(report)))

    async def _answer_top(self, limit: int, answered: Answered) -> None:
        found = await self._ask_each(lambda call_id: messages.AskTop(call_id, limit))
        groups: dict[tuple[str, str], HotGroup] = {}
        streams: dict[str, HotStream] = {}
        for shard, answer in enumerate(found):
            if not isinstance(answer, bytes):
                continue
            top = _shard_top.decode(answer)
            for stream, group_id, rate in top.groups:
                groups[stream, group_id] = HotGroup(stream, group_id, shard, rate)
            for stream, rate in top.streams:
                streams.setdefault(stream, HotStream(stream)).operations_per_s += rate
        for key, rate in self._deliveries.top(limit, time.monotonic()):
            shard = self._links.shard_of(key)
            groups.setdefault(key, HotGroup(*key, shard)).deliveries_per_s = round(rate, 3)
        for key, group in groups.items():
            group.subscriptions = self._hub.count(key)
        report = TopReport(
            _now_ms(),
            self._gateway_id,
            sorted(groups.values(), key=_heat)[:limit],
            sorted(streams.values(), key=lambda stream: -stream.operations_per_s)[:limit],
            [shard for shard, answer in enumerate(found) if not isinstance(answer, bytes)],
        )
        answered(Reply(0, _encode(report)))

    async def _ask_each(self, ask: _Ask) -> list[bytes | str]:
        """What each shard answers, or why it does not."""
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[bytes | str]] = []
        for link in self._links.links:
            future: asyncio.Future[bytes | str] = loop.create_future()
            futures.append(future)
            call_id = link.next_call_id()
            link.call(ask(call_id), call_id, _into(future))
        await asyncio.wait(futures, timeout=ANSWER_S)
        late = f"no answer within {ANSWER_S:g} s"
        return [future.result() if future.done() else late for future in futures]


def _into(future: asyncio.Future[bytes | str]) -> Answered:
    def answered(answer: Answer) -> None:
        if future.done():
            return
        if isinstance(answer, BrokerError):
            future.set_result(answer.message)
        else:
            assert isinstance(answer, Reply)
            assert answer.result is not None, "what these are answered with"
            future.set_result(answer.result)

    return answered


def _heat(group: HotGroup) -> float:
    return -(group.operations_per_s + group.deliveries_per_s)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _decode(function_id: str, data: bytes, kind: type[_Input]) -> _Input:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as error:
        raise deserialization_error(function_id, error) from None
