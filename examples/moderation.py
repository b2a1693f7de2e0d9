"""A moderated stream: a trigger hides messages, and its condition says which it is called for.

Everyone who looks at the room sees a message at once; when the condition finds a word that is not
wanted, the handler changes the message, and everyone sees that too. Connects to III_URL, by default
ws://localhost:49134, and runs until Ctrl-C or the end of its standard input.
"""

import os
import sys
from typing import Any

from iii import register_worker

UNWANTED = {"spam", "scam"}


def is_suspicious(change: dict[str, Any]) -> bool:
    """The condition: only `False` keeps the handler from being called."""
    event = change["event"]
    if event["type"] not in ("create", "update") or event["data"].get("hidden"):
        return False
    return not UNWANTED.isdisjoint(event["data"]["text"].lower().split())


def main() -> None:
    worker = register_worker(os.environ.get("III_URL", "ws://localhost:49134"))

    def hide(change: dict[str, Any]) -> None:
        item = {
            "stream_name": change["streamName"],
            "group_id": change["groupId"],
            "item_id": change["id"],
        }
        ops = [{"type": "merge", "value": {"text": "(hidden)", "hidden": True}}]
        worker.trigger({"function_id": "stream::update", "payload": {**item, "ops": ops}})
        print(f"hid {change['id']}", flush=True)

    worker.register_function("moderation::is_suspicious", is_suspicious)
    worker.register_function("moderation::hide", hide)
    config = {"stream_name": "chat", "condition_function_id": "moderation::is_suspicious"}
    worker.register_trigger({"type": "stream", "function_id": "moderation::hide", "config": config})

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
