"""The programs and the page in examples/, as a reader of the documents starts them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote
from urllib.request import urlopen

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


def test_moderation(memory_broker: Broker) -> None:
    """What the condition finds is changed for everyone, the rest is left alone."""
    with example(memory_broker, "moderation.py") as moderator:
        moderator.wait_for_keys(text="ready")
        with node_worker(memory_broker) as other:
            for item_id, text in (("ok", "hello"), ("bad", "buy SPAM now"), ("fine", "bye")):
                data = {"id": item_id, "text": text}
                other.call("stream::set", item("chat", "moderated", item_id, data=data))
            moderator.wait_for(printed("hid bad"))

            def texts() -> list[str]:
                group = {"stream_name": "chat", "group_id": "moderated"}
                return [message["text"] for message in other.call("stream::list", group)]

            until(lambda: texts() == ["hello", "(hidden)", "bye"], "the message is hidden")


def test_chat_with_auth() -> None:
    """The token that is printed opens room-1 in a browser, no other room, and no other does."""
    config = IN_MEMORY.replace("config:\n", "config:\n      auth_function: chat::auth\n", 1)
    with Broker(config) as broker, example(broker, "auth.py") as auth, browser(EXAMPLES) as page:
        page.wait_for(lambda report: "origin" in report)
        token = auth.wait_for(printed("ready"))["text"].rpartition(" ")[2]
        with node_worker(broker) as worker:
            data = {"id": "m1", "from": "bob", "text": "for members"}
            worker.call("stream::set", item("chat", "room-1", "m1", data=data))
            worker.call("stream::set", item("chat", "room-2", "m1", data=data))

        def opened(room: str, with_token: str) -> None:
            url = quote(f"{broker.stream_url}/stream/chat/{room}/", safe="")
            page.send("goto", path=f"/chat.html?url={url}&token={quote(with_token)}")

        opened("room-1", token)
        until(lambda: page.texts("#messages .text") == ["for members"], "it is shown")
        opened("room-2", token)
        until(lambda: page.texts("#state") == ["live"], "connected")
        assert page.texts("#messages .text") == []
        opened("room-1", token[:-1] + ("0" if token[-1] != "0" else "1"))
        until(lambda: metric_of(broker, 'broker_auth_total{outcome="refused"}') >= 1, "refused")
        assert page.texts("#state") == ["connecting"]
        assert token not in broker.log


def metric_of(broker: Broker, name: str) -> float:
    with urlopen(broker.metrics_url, timeout=10) as response:
        lines = response.read().decode().splitlines()
    return next(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + " "))


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
