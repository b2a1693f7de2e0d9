"""Authentication: who shows a token may look at the rooms that the token names, for a while.

Start the broker with `auth_function: chat::auth` in its stream block (see README.md), then this.
It prints a token for alice; open chat.html?token=TOKEN, or connect with it:

    new WebSocket('ws://localhost:3112/stream/chat/room-1/', ['Authorization', TOKEN])

Without a token, or with one that was changed or has expired, the handshake is refused with 401;
another room's join is answered with `unauthorized`. Connects to III_URL, by default
ws://localhost:49134. SECRET signs the tokens; without it a new one is made at each start.
"""

import base64
import hashlib
import hmac
import json
import os
import secrets
import sys
import time
from typing import Any

from iii import register_worker

SECRET = os.environ.get("SECRET", secrets.token_hex()).encode()


def sign(claims: dict[str, Any]) -> str:
    """A token that says `claims` and that nobody else can make."""
    body = base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=")
    return f"{body.decode()}.{hmac.new(SECRET, body, hashlib.sha256).hexdigest()}"


def verified(token: str) -> dict[str, Any] | None:
    """The claims of a token, None if it is not one of ours or has expired."""
    body, _, signature = token.partition(".")
    expected = hmac.new(SECRET, body.encode(), hashlib.sha256).hexdigest()
    if not hmac.compare_digest(signature.encode(), expected.encode()):
        return None
    claims: dict[str, Any] = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    return claims if claims["expires_at"] > time.time() * 1000 else None


def auth(request: dict[str, Any]) -> dict[str, Any]:
    """Asked before each client is let in, and again when it sends `{"type": "auth", "data": …}`."""
    if "data" in request:  # a fresh token on the open connection
        token = request["data"]["token"]
    else:  # browsers send it as a subprotocol, programs as a header
        offered = request["headers"].get("sec-websocket-protocol", "").split(",")
        bearer = request["headers"].get("authorization", "")
        token = offered[1].strip() if len(offered) == 2 else bearer.removeprefix("Bearer ")
    claims = verified(token)
    if claims is None:
        return {"unauthorized": True}
    # The context goes to join and leave triggers; the broker closes the connection at expires_at.
    return {"context": claims, "expires_at": claims["expires_at"]}


def join(subscription: dict[str, Any]) -> dict[str, Any]:
    """Asked before each join."""
    return {"unauthorized": subscription["group_id"] not in subscription["context"]["rooms"]}


def main() -> None:
    worker = register_worker(os.environ.get("III_URL", "ws://localhost:49134"))
    worker.register_function("chat::auth", auth)
    worker.register_function("chat::join", join)
    config = {"stream_name": "chat"}
    worker.register_trigger({"type": "stream:join", "function_id": "chat::join", "config": config})

    # Registrations are not answered; what is sent after them is.
    worker.trigger({"function_id": "stream::list_all", "payload": {}})
    expires_at = int((time.time() + 3600) * 1000)
    token = sign({"user": "alice", "rooms": ["room-1"], "expires_at": expires_at})
    print(f"ready, a token for alice: {token}", flush=True)
    try:
        sys.stdin.read()
    except KeyboardInterrupt:
        pass
    finally:
        worker.shutdown()


if __name__ == "__main__":
    main()
