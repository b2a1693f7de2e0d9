"""A worker of the published Python SDK that does what standard input says.

The commands and reports are those of tests/node/worker.mjs. The end of the input ends it.
"""

from __future__ import annotations

import json
import sys
import threading
from typing import Any

from iii import InitOptions, InvocationError, TriggerAction, register_worker

_output = threading.Lock()


def report(line: dict[str, Any]) -> None:
    """Write one report; handlers and calls do so from threads of their own."""
    with _output:
        print(json.dumps(line), flush=True)


def main() -> None:
    # Without an address it takes the one in the environment, III_URL.
    worker = register_worker(options=InitOptions(worker_name="python-worker"))

    def register_function(function_id: str, returns: Any) -> None:
        # async: other functions run in threads, which would report in any order
        async def handler(data: Any) -> Any:
            report({"called": function_id, "data": data})
            return returns

        worker.register_function(function_id, handler)

    def call(tag: int, function_id: str, payload: Any) -> None:
        try:
            result = worker.trigger({"function_id": function_id, "payload": payload})
        except InvocationError as error:
            report({"answer": tag, "error": str(error)})
        else:
            report({"answer": tag, "result": result})

    for line in sys.stdin:
        match json.loads(line):
            case {"do": "function", "id": function_id, "returns": returns}:
                register_function(function_id, returns)
            case {"do": "trigger", "type": kind, "function_id": function_id, "config": config}:
                worker.register_trigger(
                    {"type": kind, "function_id": function_id, "config": config}
                )
            case {"do": "call", "tag": tag, "function_id": function_id, "payload": payload}:
                threading.Thread(target=call, args=(tag, function_id, payload)).start()
            case {"do": "void", "function_id": function_id, "payload": payload}:
                action = TriggerAction.Void()
                worker.trigger({"function_id": function_id, "payload": payload, "action": action})
            case command:
                raise ValueError(f"unknown command {command}")
    worker.shutdown()


if __name__ == "__main__":
    main()
