"""A first worker: keeps chat messages in the broker and prints every change of the room.

Start the broker (`broker serve`), then `python examples/worker.py`, then open `chat.html`. The
worker connects to III_URL, by default ws://localhost:49134, and runs until Ctrl-C or the end of
its standard input. Needs `pip install iii-sdk`.
"""

import os
import sys
import time
import uuid
from typing import Any

from iii import register_worker

ROOM = {"stream_name": "chat", "group_id": "room-1"}


def main() -> None:
    worker = register_worker(os.environ.get("III_URL", "ws://localhost:49134"))

    def keep(message: dict[str, Any]) -> None:
        # Clients find an item by the id inside it, so it is stored there too.
        payload = {**ROOM, "item_id": message["id"], "data": message}
        worker.trigger({"function_id": "stream::set", "payload": payload})

    def say(data: dict[str, Any]) -> dict[str, Any]:
        """Any other program can call this one: `{"from": …, "text": …}`."""
        message = {
            "id": f"msg-{uuid.uuid4()}",
            "from": data["from"],
            "text": data["text"],
            "sent_at_ms": time.time_ns() // 1_000_000,
        }
        keep(message)
        return message

    # Functions that are not `async` run in threads, several at a time; these run one by one.
    async def changed(envelope: dict[str, Any]) -> None:
        """Runs after each change of the room, with what clients are sent."""
        event = envelope["event"]
        print(event["type"], envelope["id"], event.get("data", event.get("event")), flush=True)

    worker.register_function("chat::say", say)
    worker.register_function("chat::changed", changed)
    worker.register_trigger({"type": "stream", "function_id": "chat::changed", "config": ROOM})

    print("ready", flush=True)

    keep({"id": "msg-1", "from": "alice", "text": "Is anybody here?"})
    keep({"id": "msg-2", "from": "bob", "text": "I am."})
    try:
        sys.stdin.read()
    except KeyboardInterrupt:
        pass
    finally:
        worker.shutdown()


if __name__ == "__main__":
    main()
