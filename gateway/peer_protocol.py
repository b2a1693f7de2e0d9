"""What gateways tell one another, without I/O.

A gateway tells its peers of its own workers and of what these registered, never of what it has
from other peers. What a peer wants of such a worker it sends to the worker's gateway.
"""

from __future__ import annotations

import msgspec

from broker.link_protocol import FrameReader
from broker.messages import (
    Delete,
    Get,
    List,
    Message,
    ReadHistory,
    Send,
    Set,
    Update,
)

VERSION = 1
"""Of the messages below; a peer that speaks another one is not linked."""


class PeerMessage(Message):
    """Base of all messages between gateways."""


class Hello(PeerMessage, tag=0):
    """First on a link, from both ends.

    gateway_id: of this run of the process. broker_id, index: whose gateway it is, also when it is
    started again.
    """

    version: int
    gateway_id: str
    broker_id: str
    index: int


class Heartbeat(PeerMessage, tag=1):
    """A sign of life."""


class Announced(PeerMessage, tag=2):
    """All that was there when the link was made has been told."""


class WorkerIs(PeerMessage, tag=3):
    """A worker is connected, or says something else of itself (`fields`, a JSON object).

    `event`: what workers-available triggers are told.
    """

    worker_id: str
    namespace: str
    connected_at_ms: int
    ip_address: str
    fields: bytes
    event: str


class WorkerGone(PeerMessage, tag=4):
    """The worker left, with all that it registered; calls that it got are not answered."""

    worker_id: str


class Registered(PeerMessage, tag=5):
    """What the worker registered, or took back, as a message of the worker port (JSON text)."""

    worker_id: str
    at_ms: int
    text: bytes


class Deliver(PeerMessage, tag=6):
    """To be sent to a worker of the receiver; with `invocation_id` a call that is answered.

    `is_call` False: it must not be lost, a worker that takes nothing any more is cut off.
    """

    worker_id: str
    payload: bytes
    invocation_id: str | None
    is_call: bool = True


class Answer(PeerMessage, tag=7):
    """How such a call ended: JSON texts."""

    invocation_id: str
    result: bytes | None
    error: bytes | None


class Forget(PeerMessage, tag=8):
    """Nobody waits for the answer any more."""

    worker_id: str
    invocation_id: str


class Reattach(PeerMessage, tag=9):
    """The worker is connected to the sender now, and shows the token of its old connection."""

    worker_id: str
    token: str


class Returned(PeerMessage, tag=10):
    """A client joined with this head of a subscription: it has not left."""

    head: bytes


class Operate(PeerMessage, tag=11):
    """An operation on a group that a worker of the receiver stores."""

    call_id: int
    call: bytes


class Read(PeerMessage, tag=12):
    """Asks for what a group, or an item, holds that a worker of the receiver stores.

    Until `Release` nothing else is done to the group.
    """

    call_id: int
    stream: str
    group_id: str
    item_id: str | None


class Release(PeerMessage, tag=13):
    """Go on with the group."""

    call_id: int


class Ask(PeerMessage, tag=14):
    """A call of a function that tells of the receiver's own clients."""

    call_id: int
    function_id: str
    data: bytes


class Reply(PeerMessage, tag=15):
    """The JSON text of a result, or None."""

    call_id: int
    result: bytes | None


class Failure(PeerMessage, tag=16):
    call_id: int
    code: str
    message: str
    field: str | None
    retryable: bool


class Stopping(PeerMessage, tag=17):
    """The sender stops; `clients_gone`: all leaves of its clients are told."""

    clients_gone: bool


AnyPeerMessage = (
    Hello
    | Heartbeat
    | Announced
    | WorkerIs
    | WorkerGone
    | Registered
    | Deliver
    | Answer
    | Forget
    | Reattach
    | Returned
    | Operate
    | Read
    | Release
    | Ask
    | Reply
    | Failure
    | Stopping
)

_StreamCall = Get | Set | Delete | Update | Send | List | ReadHistory

_calls: msgspec.msgpack.Decoder[_StreamCall] = msgspec.msgpack.Decoder(_StreamCall)
_encode = msgspec.msgpack.encode


def reader() -> FrameReader[AnyPeerMessage]:
    """A reader for either end of a link."""
    return FrameReader(msgspec.msgpack.Decoder(list[AnyPeerMessage]))


def call_text(call: _StreamCall) -> bytes:
    """A call as `Operate` has it."""
    return _encode(call)


def call_of(text: bytes) -> _StreamCall:
    """The inverse of `call_text`.

    Raises:
        msgspec.DecodeError: it is of another release.
    """
    return _calls.decode(text)
