"""Presence: who looks at a room is listed beside it for as long as the connection lasts.

A client that joins a group of the stream "chat" becomes an item of the same group of the stream
"presence", and stops being one when it leaves or its connection ends. Who wants to see who is
there joins that group of "presence", like any other.

Connects to III_URL, by default ws://localhost:49134, and runs until Ctrl-C or the end of its
standard input. Needs `pip install iii-sdk`.
"""

import os
import sys
from typing import Any

from iii import register_worker


def main() -> None:
    worker = register_worker(os.environ.get("III_URL", "ws://localhost:49134"))

    def place(subscription: dict[str, Any]) -> dict[str, Any]:
        return {
            "stream_name": "presence",
            "group_id": subscription["group_id"],
            "item_id": subscription["subscription_id"],
        }

    def joined(subscription: dict[str, Any]) -> dict[str, Any]:
        """Runs before the client is let in; `{"unauthorized": True}` would refuse it."""
        if subscription["stream_name"] == "chat":
            data = {"id": subscription["subscription_id"], "status": "online"}
            payload = {**place(subscription), "data": data}
            worker.trigger({"function_id": "stream::set", "payload": payload})
        return {"unauthorized": False}

    def left(subscription: dict[str, Any]) -> None:
        """Runs however the subscription ended: by a leave, a close, or a lost connection."""
        if subscription["stream_name"] == "chat":
            worker.trigger({"function_id": "stream::delete", "payload": place(subscription)})

    worker.register_function("presence::joined", joined)
    worker.register_function("presence::left", left)
    worker.register_trigger(
        {"type": "stream:join", "function_id": "presence::joined", "config": {}}
    )
    worker.register_trigger({"type": "stream:leave", "function_id": "presence::left", "config": {}})

    # Registrations are not answered; what is sent after them is.
    worker.trigger({"function_id": "stream::list_all", "payload": {}})
    print("ready", flush=True)

    try:
        sys.stdin.read()
    except KeyboardInterrupt:
        pass
    finally:
        worker.shutdown()


if __name__ == "__main__":
    main()
