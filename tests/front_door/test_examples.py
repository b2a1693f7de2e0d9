"""The programs and the page in examples/, as a reader of the documents starts them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.front_door.sdk_programs import Program, Report, browser, node_worker
from tests.front_door.sdk_scenarios import item, until
from tests.support.broker import IN_MEMORY, REPOSITORY, Broker

EXAMPLES = REPOSITORY / "examples"

pytestmark = pytest.mark.timeout(300)


def example(broker: Broker, name: str) -> Program:
    return Program([sys.executable, EXAMPLES / name], {"III_URL": broker.worker_url})


def printed(start: str) -> Callable[[Report], bool]:
    """Matches a line that begins like this."""
    return lambda report: report.get("text", "").startswith(start)


def test_worker(memory_broker: Broker) -> None:
    """It sets items, and prints what its trigger and its function are told."""
    with example(memory_broker, "worker.py") as first:
        first.wait_for_keys(text="ready")
        first.wait_for(printed("create msg-1"))
        first.wait_for(printed("create msg-2"))
        with node_worker(memory_broker) as other:
            listed = other.call("stream::list", {"stream_name": "chat", "group_id": "room-1"})
            assert [message["id"] for message in listed] == ["msg-1", "msg-2"]
            message = {"id": "msg-9", "from": "zoe", "text": "hello"}
            other.call("stream::set", item("chat", "room-1", "msg-9", data=message))
            first.wait_for(printed("create msg-9"))
            said = other.call("chat::say", {"from": "bob", "text": "hi all"})
            assert said["text"] == "hi all"
            first.wait_for(printed(f"create {said['id']}"))
            other.call("stream::delete", item("chat", "room-1", "msg-9"))
            first.wait_for(printed("delete msg-9"))


def test_chat_page(tmp_path: Path) -> None:
    """It shows what is there and what changes, as text, whatever the text is."""
    with browser(EXAMPLES) as page:
        page.wait_for(lambda report: "origin" in report)
        with Broker(IN_MEMORY) as broker, node_worker(broker) as worker:

            def say(item_id: str, text: str) -> None:
                data = {"id": item_id, "from": "alice", "text": text}
                worker.call("stream::set", item("chat", "room-1", item_id, data=data))

            def shows(*texts: str) -> None:
                until(lambda: page.texts("#messages .text") == list(texts), f"shown: {texts}")

            say("m1", "hello")
            url = f"{broker.stream_url}/stream/chat/room-1/"
            page.send("goto", path=f"/chat.html?url={quote(url, safe='')}")
            shows("hello")
            hostile = "<img src=x onerror=alert(1)><b>bold</b>"
            say("m2", hostile)
            shows("hello", hostile)
            assert page.texts("#messages img") == page.texts("#messages b") == []
            say("m1", "hello again")
            shows("hello again", hostile)
            shot = tmp_path / "chat.png"
            page.send("screenshot", file=str(shot))
            page.wait_for_keys(screenshot=str(shot))
            assert shot.read_bytes().startswith(b"\x89PNG")
            worker.call("stream::delete", item("chat", "room-1", "m2"))
            shows("hello again")
            broker.restart()  # in memory: what was said is gone
            shows()
            until(lambda: page.texts("#state") == ["live"], "live again")
            say("m3", "after the restart")
            shows("after the restart")
