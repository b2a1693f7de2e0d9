"""The stream port: clients' connections, their joins and leaves, plain HTTP.

Protocol sections 5 and 6.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import assert_never

from websockets.http11 import Request

from broker import health, logs, messages
from broker.config import Limits, StreamAccess
from broker.errors import BrokerError, InvalidRequest, ShardUnavailable
from broker.messages import Event, Synced
from broker.names import Group, check_name
from broker.tasks import Tasks
from gateway import stream_protocol as wire
from gateway.access import Proxies, origin_allowed, origin_plausible
from gateway.auth import Auth, Outcome, Verdict, auth_input, renewal_input
from gateway.connection import PAUSED_BY_WORK, Connection, plain_response
from gateway.custom_streams import CustomStreams, Unread
from gateway.hub import Hub, HubEvent, State, Subscription
from gateway.leaves import Leaves, head_of, leave_payload
from gateway.listener import Listener
from gateway.shard_links import Answer, ShardLinks
from gateway.throttle import Throttle
from gateway.triggers import Triggers
from gateway.websocket import text_frame, text_frame_of

INBOX_MAX = 256
"""Messages of a client that wait for one before them; past it no more is read for now."""
SYNC_RETRY_S = 2.0
"""After a sync that failed, when its subscription is tried again."""
EXPIRED_CODE = 4401
"""Close code: what the auth function allowed has expired."""
DISCONNECTED_CODE = 4403
"""Close code: a worker asked for it with `broker::disconnect`."""
TOO_SLOW_CODE = 4408
"""Close code: the client read nothing of what waited for it for long."""
EXPIRY_CHECK_S = 3600.0
"""At least so often the wall clock, which may be set, is asked about an expiry."""

_WELCOME = """\
This is a stream broker: it pushes every change of a group's items to whoever joined the group.

Connect a WebSocket to this address and send
    {"type": "join", "data": {"subscriptionId": "1", "streamName": "chat", "groupId": "room-1"}}
or connect to /stream/<stream>/<group>/ or /stream/<stream>/<group>/<item>/ and just listen.
A client for pages, which reconnects and misses nothing: import { Client } from '/client.js'
"""

_CLIENT_FILE = Path(__file__).with_name("static") / "stream.js"

_log = logs.Log("stream_port")


class StreamPort(Listener):
    """Accepts clients; holds the hub."""

    def __init__(
        self,
        limits: Limits,
        access: StreamAccess,
        *,
        hub: Hub,
        auth: Auth,
        triggers: Triggers,
        leaves: Leaves,
        links: ShardLinks,
        custom: CustomStreams,
        not_ready: health.NotReady,
    ) -> None:
        super().__init__(
            "stream",
            limits,
            limits.client_message_bytes_max,
            limits.client_send_queue_bytes_max,
            TOO_SLOW_CODE,
        )
        self.hub = hub
        self.auth = auth
        self.triggers = triggers
        self.leaves = leaves
        self.links = links
        self.custom = custom
        self._not_ready = not_ready
        self.use_access(access)
        self.tasks = Tasks()
        self.clients: dict[int, Client] = {}
        """By number, in the order in which they came."""
        self.clients_total = 0
        self.joins_total = {"accepted": 0, "unauthorized": 0, "refused": 0}
        self.resyncs_total = 0
        self.bad_messages_total = 0
        self.behind_total = 0
        self.expired_total = 0
        self.resumed_total = 0
        self.conflated_total = 0
        self.frames_dropped_total = 0

    def use_access(self, access: StreamAccess) -> None:
        """Let in, from now on, by these origins and proxies."""
        self._allowed_origins = access.allowed_origins
        self._proxies = Proxies(access.trusted_proxies)

    # Requests.

    def request_received(self, connection: Connection, request: Request) -> None:
        path, _, query = request.path.partition("?")
        if "Upgrade" not in request.headers and path in _PAGES:
            self._page(connection, request, path)
            return
        try:
            joined = wire.joined_by_path(path, query)
        except ValueError:
            self.refuse(connection, HTTPStatus.NOT_FOUND, "", "not_found")
            return
        if not self._origin_allowed(connection, request):
            self.refuse(connection, HTTPStatus.FORBIDDEN, "origin not allowed\n", "origin")
            return
        if (response := connection.check_handshake(request)) is not None:
            self.count_refused("bad_request")
            connection.respond(response)
            return
        address = self._proxies.client_address(request.headers, connection.remote_address)
        if not self.admit(connection, address):
            return
        if self.auth.function_id is None:
            Client(self, connection, address).start(joined)
        else:
            self.tasks.start(self._ask_auth(connection, request, address, joined))

    def _origin_allowed(self, connection: Connection, request: Request) -> bool:
        if self._allowed_origins is not None:
            return origin_allowed(request.headers, self._allowed_origins)
        return origin_plausible(request.headers, connection.local_address)

    async def _ask_auth(
        self,
        connection: Connection,
        request: Request,
        address: str,
        joined: wire.JoinData | None,
    ) -> None:
        question = auth_input(request, address)
        verdict = await self.auth.ask(question)
        match verdict.outcome:
            case Outcome.ACCEPTED:
                client = Client(self, connection, address)
                client.authorize(question, verdict)
                client.start(joined)
            case Outcome.REFUSED | Outcome.FAILED:
                self.refuse(connection, HTTPStatus.UNAUTHORIZED, "unauthorized\n", "unauthorized")
            case Outcome.UNAVAILABLE | Outcome.OVERLOADED:
                text = "authentication is not available\n"
                self.refuse(connection, HTTPStatus.SERVICE_UNAVAILABLE, text, "auth_unavailable")
            case _:
                assert_never(verdict.outcome)

    def _page(self, connection: Connection, request: Request, path: str) -> None:
        if request.method != "GET":
            self.refuse(connection, HTTPStatus.METHOD_NOT_ALLOWED, "use GET\n", "bad_request")
        elif path == "/":
            connection.respond(plain_response(_WELCOME))
        elif path == "/client.js":
            text = _CLIENT_FILE.read_text(encoding="utf-8")  # small, and the system caches it
            connection.respond(plain_response(text, "text/javascript; charset=utf-8"))
        else:
            status, body = health.answer(path, self._not_ready)
            if status is not HTTPStatus.OK:
                self.count_refused("not_ready")
            connection.respond(plain_response(body.decode(), health.CONTENT_TYPE, status))

    # What shards say.

    def event_received(self, shard: int, event: Event) -> None:
        """An event of a group that this gateway wants, or wanted a moment ago."""
        if event.subscribed:
            if not self.hub.has((event.stream, event.group_id)):
                link = self.links.links[shard]
                link.tell(messages.Leave(event.stream, event.group_id))
                return
            self._resync(self.hub.publish(event))

    def shard_linked(self, shard: int) -> None:
        """Subscriptions on a shard that was linked again get what they missed."""
        link = self.links.links[shard]
        for key in self.hub.groups():
            group = Group(*key)
            if self.links.of(group) is not link:
                continue
            # First for those that go on: a sync of another one would tell them of a gap.
            if (position := self.hub.position(group)) is not None:
                call_id = link.next_call_id()
                join = messages.Join(call_id, *group, None, None, *position)
                link.call(join, call_id, partial(self._caught_up, group))
            self._resync([s for s in self.hub.of_group(group) if s.state is not State.LIVE])

    def _caught_up(self, group: Group, answer: Answer) -> None:
        """The live subscriptions of a group get what was not told, or else a sync each."""
        if isinstance(answer, ShardUnavailable) and not self.links.of(group).ready:
            return  # they wait for the next time that it is linked
        if isinstance(answer, Synced) and answer.missed is not None:
            for payload in answer.missed:
                self._resync(self.hub.publish(wire.event_of(group, payload)))
            return
        behind = [s for s in self.hub.of_group(group) if s.state is State.LIVE]
        for subscription in behind:
            self.hub.behind(subscription)
        self._resync(behind)

    def _resync(self, subscriptions: list[Subscription]) -> None:
        for subscription in subscriptions:
            client = subscription.subscriber
            assert isinstance(client, Client)
            client.sync(subscription)


class Client:
    """A connected client and its subscriptions."""

    __slots__ = (
        "_awaited",
        "_closed",
        "_conflated",
        "_conflated_bytes",
        "_connection",
        "_expiry",
        "_handling",
        "_in_loop",
        "_inbox",
        "_inbox_full",
        "_port",
        "_question",
        "_subscriptions",
        "_throttle",
        "address",
        "connected_at_ms",
        "context",
        "expires_at_ms",
        "number",
    )

    def __init__(self, port: StreamPort, connection: Connection, address: str) -> None:
        self._port = port
        self._connection = connection
        self.address = address
        self.context = b"null"
        self.connected_at_ms = time.time_ns() // 1_000_000
        self.expires_at_ms: float | None = None
        self.number = 0
        self._question = b""  # what the auth function was asked
        self._expiry: asyncio.TimerHandle | None = None
        self._subscriptions: dict[str, Subscription] = {}
        self._inbox: list[bytes | Sequence[wire.JoinData]] = []  # few: no deque for each client
        self._handling = False  # a message that has to wait for an answer
        self._in_loop = False
        self._inbox_full = False
        self._awaited: Subscription | None = None
        self._closed = False
        self._conflated: dict[tuple[Group, str], bytes] = {}  # newest frame of items, by age
        self._conflated_bytes = 0
        per_s = port.limits.client_messages_per_s_max
        self._throttle = Throttle(connection, per_s, self._go_on) if per_s else None

    def start(self, joined: wire.JoinData | None) -> None:
        """Complete the handshake, and join what the path names."""
        if joined is not None:
            self._inbox.append([joined])
        if self._connection.accept(self):
            self._port.clients_total += 1
            self.number = self._port.clients_total
            self._port.clients[self.number] = self
            self._watch_expiry()
            self._handle_inbox()

    def authorize(self, question: bytes, verdict: Verdict) -> None:
        """Take what the auth function answered to `question`, that of the handshake."""
        self._question = question
        self.expires_at_ms = verdict.expires_at_ms
        if verdict.context != self.context:
            self.context = verdict.context
            self._port.leaves.renewed(self._subscriptions.values())

    def disconnect(self, code: int, reason: str) -> None:
        """Close the connection; its subscriptions end now, not when the client agrees."""
        self._connection.close(code, reason)
        self._end_all()

    @property
    def subscriptions(self) -> list[Subscription]:
        """Those that stand."""
        return list(self._subscriptions.values())

    def _watch_expiry(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
        if self.expires_at_ms is None:
            return
        left_s = self.expires_at_ms / 1000 - time.time()
        if left_s <= 0:
            self._port.expired_total += 1
            self.disconnect(EXPIRED_CODE, "the authentication has expired")
            return
        loop = asyncio.get_running_loop()
        self._expiry = loop.call_later(min(left_s, EXPIRY_CHECK_S), self._watch_expiry)

    # Subscriber.

    def deliver(self, frames: bytes) -> bool:
        return self._connection.send(frames)

    def deliver_newest(self, group: Group, events: Sequence[HubEvent]) -> bool:
        if not self._connection.write_paused and not self._conflated:
            return self._connection.send(b"".join([event.frame for event in events]))
        for event in events:
            if event.item_id is None or event.custom:
                self._port.conflated_total += 1
                continue
            key = (group, event.item_id)
            if (older := self._conflated.pop(key, None)) is not None:
                self._port.conflated_total += 1
                self._conflated_bytes -= len(older)
            self._conflated[key] = event.frame
            self._conflated_bytes += len(event.frame)
        return self._conflated_bytes <= self._port.send_queue_bytes_max

    def fell_behind(self) -> None:
        self._port.behind_total += 1
        self._port.frames_dropped_total += len(self._conflated)
        self._conflated.clear()
        self._conflated_bytes = 0
        self._port.frames_dropped_total += self._connection.drop_waiting()
        for subscription in self._subscriptions.values():
            if subscription.state is State.LIVE:
                self._port.hub.behind(subscription)

    # What the connection calls.

    def drained(self) -> None:
        self._flush_conflated()
        for subscription in list(self._subscriptions.values()):
            if subscription.state is State.BEHIND:
                self.sync(subscription)

    def message_received(self, text: bytes) -> None:
        self._inbox.append(text)
        if not self._handling:
            self._handle_inbox()
        elif len(self._inbox) >= INBOX_MAX and not self._inbox_full:
            self._inbox_full = True
            self._port.paused_total += 1
            self._connection.pause_reading(PAUSED_BY_WORK)

    def closed(self) -> None:
        self._end_all()

    def _end_all(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._inbox.clear()
        del self._port.clients[self.number]
        if self._expiry is not None:
            self._expiry.cancel()
        for subscription in self.subscriptions:
            self._end(subscription, on_purpose=self._port.stopping)

    # Messages, one after the other.

    def _handle_inbox(self) -> None:
        self._in_loop = True
        self._handle_messages()
        self._in_loop = False
        if self._inbox_full and not self._inbox:
            self._inbox_full = False
            self._connection.resume_reading(PAUSED_BY_WORK)

    def _done(self) -> None:
        """The message that had to wait is done with: take the next ones."""
        self._handling = False
        self._go_on()

    def _go_on(self) -> None:
        if not self._in_loop:
            self._handle_inbox()

    def _handle_messages(self) -> None:
        throttle = self._throttle
        while self._inbox and not self._handling and not (throttle and throttle.throttled):
            entry = self._inbox.pop(0)
            if throttle is not None:
                self._port.throttled_total += throttle.count()
            if not isinstance(entry, bytes):
                self._join_all(entry)
                continue
            try:
                message = wire.decode(entry)
                match message:
                    case wire.Join():
                        self._join_all(message.joins)
                    case wire.Leave():
                        self._leave(message.data)
                    case wire.JoinMany():
                        self._join_all(message.joins)
                    case wire.Auth():
                        self._renew(bytes(message.data))
                    case None:
                        pass
                    case _:
                        assert_never(message)
            except InvalidRequest as error:
                self._port.bad_messages_total += 1
                self._tell(wire.error_payload(error, entry))

    def _join_all(self, joins: Sequence[wire.JoinData]) -> None:
        """Join the first; the others wait in its place, each for the one before it."""
        if len(joins) > 1:
            self._inbox.insert(0, joins[1:])
        try:
            self._check(joins[0])
        except InvalidRequest as error:
            self._port.bad_messages_total += 1
            self._port.joins_total["refused"] += 1
            self._tell(wire.join_error(error, joins[0]))
        else:
            self._join(joins[0])

    def _check(self, data: wire.JoinData) -> None:
        bytes_max = self._port.limits.name_bytes_max
        check_name("data.subscriptionId", data.subscription_id, bytes_max)
        check_name("data.streamName", data.stream_name, bytes_max)
        check_name("data.groupId", data.group_id, bytes_max)
        if data.id is not None:
            check_name("data.id", data.id, bytes_max)
        count_max = self._port.limits.subscriptions_per_connection_max
        if (
            data.subscription_id not in self._subscriptions
            and len(self._subscriptions) >= count_max
        ):
            raise InvalidRequest(
                "too_many_subscriptions",
                f"the connection has {count_max} subscriptions, which is the limit",
                "data.subscriptionId",
            )

    def _join(self, data: wire.JoinData) -> None:
        if not self._port.triggers.has_join(data.stream_name, data.group_id):
            self._subscribe(data)
            return
        self._handling = True
        self._port.tasks.start(self._ask_triggers(data))

    async def _ask_triggers(self, data: wire.JoinData) -> None:
        group = Group(data.stream_name, data.group_id)
        subscription = Subscription(self, data.subscription_id, group, data.id)
        head = head_of(subscription)
        earlier = self._subscriptions.get(data.subscription_id)
        again = earlier is not None and head_of(earlier) == head
        payload = leave_payload(head, self.context)
        allowed = await self._port.triggers.may_join(*group, payload)
        if self._closed:
            if allowed and not again:  # whoever allowed it takes the client for joined
                self._port.triggers.fire_leave(*group, payload)
            return
        if allowed:
            self._subscribe(data)
        else:
            self._port.joins_total["unauthorized"] += 1
            event = {"type": "unauthorized"}
            self._tell(wire.envelope(data.stream_name, data.group_id, data.id, event))
            self._done()

    def _subscribe(self, data: wire.JoinData) -> None:
        self._port.joins_total["accepted"] += 1
        group = Group(data.stream_name, data.group_id)
        earlier = self._subscriptions.get(data.subscription_id)
        if earlier is not None and (earlier.group, earlier.item_id) == (group, data.id):
            earlier.with_ids = data.ids
            self._first_sync(earlier, data)  # it stays as it is and misses nothing meanwhile
            return
        subscription = Subscription(self, data.subscription_id, group, data.id)
        subscription.with_ids = data.ids
        subscription.conflate = data.conflate
        self._port.hub.add(subscription)
        self._subscriptions[data.subscription_id] = subscription
        self._port.leaves.joined(subscription)
        if earlier is not None:
            self._port.leaves.replaced(earlier)
            self._forget(earlier)
        self._first_sync(subscription, data)

    def _first_sync(self, subscription: Subscription, data: wire.JoinData) -> None:
        """Sync, and take no further message before it came: joins are answered in order."""
        self._handling = True
        self._awaited = subscription
        since = data.position
        subscription.position = None if since is None else (since, data.epoch)
        self.sync(subscription)

    def _leave(self, data: wire.LeaveData) -> None:
        subscription = self._subscriptions.get(data.subscription_id)
        if subscription is not None:
            self._end(subscription, on_purpose=True)

    def _end(self, subscription: Subscription, *, on_purpose: bool) -> None:
        """A subscription is over: take it out of delivery, then tell the leave triggers."""
        del self._subscriptions[subscription.subscription_id]
        self._forget(subscription)
        self._port.leaves.left(subscription, on_purpose=on_purpose)

    def _forget(self, subscription: Subscription) -> None:
        if self._conflated and not any(
            s.group == subscription.group for s in self._subscriptions.values()
        ):
            self._forget_conflated(subscription.group, None)
        if self._port.hub.remove(subscription):
            self._port.links.of(subscription.group).tell(messages.Leave(*subscription.group))

    # Renewals.

    def _renew(self, data: bytes) -> None:
        if self._port.auth.function_id is None:
            raise InvalidRequest("auth_not_configured", "there is no auth function to ask", "type")
        self._handling = True
        self._port.tasks.start(self._ask_again(data))

    async def _ask_again(self, data: bytes) -> None:
        verdict = await self._port.auth.ask(renewal_input(self._question, data))
        if self._closed:
            return
        if verdict.outcome is Outcome.ACCEPTED:
            self.authorize(self._question, verdict)
            self._watch_expiry()
            self._tell(wire.authenticated(self.expires_at_ms))
        else:
            self._tell(wire.auth_error(verdict.outcome in _NOT_NOW))
        self._done()

    # Syncs.

    def sync(self, subscription: Subscription) -> None:
        """Ask for a snapshot, or for what was missed since the position of the join; the
        subscription is live when it comes, if it is not yet."""
        if subscription.state is State.BEHIND:
            self._port.resyncs_total += 1
            subscription.state = State.JOINING
        answered = partial(self._synced, subscription)
        group = subscription.group
        since, epoch = subscription.position or (None, None)
        message = messages.Join(0, *group, subscription.item_id, None, since, epoch)
        message.with_ids = subscription.with_ids
        if self._port.custom.takes(group):
            self._port.custom.join(message, answered)
            return
        link = self._port.links.of(group)
        message.call_id = link.next_call_id()
        link.call(message, message.call_id, answered)

    def _synced(self, subscription: Subscription, answer: Answer | Unread) -> None:
        if self._subscriptions.get(subscription.subscription_id) is subscription:
            self._take_sync(subscription, answer)
        if self._awaited is subscription:
            self._awaited = None
            self._done()

    def _take_sync(self, subscription: Subscription, answer: Answer | Unread) -> None:
        if isinstance(answer, BrokerError):
            self._sync_failed(subscription, answer)
            return
        assert isinstance(answer, Synced | Unread), "what a join is answered with"
        if isinstance(answer, Synced) and answer.resumed:
            self._flush_conflated()
        else:  # the answer holds what is newer
            self._forget_conflated(subscription.group, subscription.item_id)
        behind = self._port.hub.synced(subscription, answer.seq, answer.epoch)
        if isinstance(answer, Unread):  # live all the same; the sync comes once reading works
            self._tell_error(subscription, answer.error)
            asyncio.get_running_loop().call_later(SYNC_RETRY_S, self._retry, subscription)
        else:
            subscription.position = None
            assert answer.body is not None, "completed by the link"
            frames = [text_frame_of(answer.head, answer.body, b"}}")]
            if answer.missed:
                frames += map(text_frame, answer.missed)
            self._port.resumed_total += answer.resumed
            if not self._connection.send(frames[0] if len(frames) == 1 else b"".join(frames)):
                # This one alone waits for its turn: were the others that have theirs to begin anew
                # as well, syncs that do not fit together would take one another's place for ever.
                self._port.behind_total += 1
                self._port.frames_dropped_total += len(frames)
                self._port.hub.behind(subscription)
        for other in behind:
            assert isinstance(other.subscriber, Client)
            other.subscriber.sync(other)

    def _forget_conflated(self, group: Group, item_id: str | None) -> None:
        for key in [k for k in self._conflated if k[0] == group and item_id in (None, k[1])]:
            self._conflated_bytes -= len(self._conflated.pop(key))

    def _flush_conflated(self) -> None:
        if self._conflated:
            frames = b"".join(self._conflated.values())
            self._conflated.clear()
            self._conflated_bytes = 0
            self._connection.send(frames)

    def _sync_failed(self, subscription: Subscription, error: BrokerError) -> None:
        if subscription.state is State.LIVE:
            self._port.hub.behind(subscription)
        else:
            subscription.state = State.BEHIND
        self._tell_error(subscription, error)
        is_linked = self._port.links.of(subscription.group).ready
        if is_linked or not isinstance(error, ShardUnavailable):  # else: when it is linked again
            asyncio.get_running_loop().call_later(SYNC_RETRY_S, self._retry, subscription)

    def _tell_error(self, subscription: Subscription, error: BrokerError) -> None:
        event = {
            "type": "error",
            "code": error.code,
            "message": error.message,
            "subscriptionId": subscription.subscription_id,
        }
        self._tell(wire.envelope(*subscription.group, None, event))

    def _retry(self, subscription: Subscription) -> None:
        current = self._subscriptions.get(subscription.subscription_id)
        if current is subscription and subscription.state is not State.JOINING:
            self.sync(subscription)

    def _tell(self, payload: bytes) -> None:
        """Send what only this client gets; dropped when too much waits for it."""
        if not self._connection.send(text_frame(payload)):
            self._port.frames_dropped_total += 1


_NOT_NOW = (Outcome.UNAVAILABLE, Outcome.OVERLOADED)
_PAGES = ("/", "/client.js", *health.PATHS)
