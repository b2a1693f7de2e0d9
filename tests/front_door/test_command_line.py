"""The command line, as people and scripts use it: real processes against a real broker."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import fcntl
import hashlib
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from broker import config
from broker.cli import completion
from tests.conftest import Run
from tests.support.broker import IN_MEMORY, REPOSITORY, Broker, free_ports
from tests.support.calls import result_of
from tests.support.worker import Invocation, Worker

KIB, MIB = 1024, 1024 * 1024
PATIENCE_S = 60.0
STREAM, GROUP, ITEM = "d\u00e9j\u00e0-\U0001f4a1", "\u90e8\u5c4b 1", "\u05d0"
COMMAND = [sys.executable, "-m", "broker"]
LOCAL_COMMANDS = ("serve", "init", "check", "gateway", "shard", "completion")
CALLS = ("streams", "groups", "list", "get", "set", "update", "delete", "send", "watch")
CALLS += ("status", "top")
COMMANDS = LOCAL_COMMANDS + CALLS
OWN_VARIABLES = ("BROKER_URL", "BROKER_STREAM_URL", "III_TOKEN", "NO_COLOR", "COLUMNS")


def environment(broker: Broker | None, **more: str) -> dict[str, str]:
    """The variables of a command: where the broker is, and `more`."""
    found = {name: value for name, value in os.environ.items() if name not in OWN_VARIABLES}
    found["PYTHONPATH"] = str(REPOSITORY)
    if broker is not None:
        found |= {"BROKER_URL": broker.worker_url, "BROKER_STREAM_URL": broker.stream_url}
    return found | more


def command(
    broker: Broker | None,
    *arguments: str,
    stdin: bytes = b"",
    cwd: Path | None = None,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Run `broker` with `arguments`; its output goes to pipes."""
    done = subprocess.run(
        [*COMMAND, *arguments],
        input=stdin,
        capture_output=True,
        timeout=PATIENCE_S,
        env=environment(broker, **variables),
        cwd=cwd,
        check=False,
    )
    return subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
    )


def output_of(broker: Broker, *arguments: str, **options: Any) -> list[str]:
    """The lines that a command prints; it must succeed and not complain."""
    done = command(broker, *arguments, **options)
    assert (done.returncode, done.stderr) == (0, ""), done
    assert done.stdout == "" or done.stdout.endswith("\n")
    return done.stdout.split("\n")[:-1]


def values_of(broker: Broker, *arguments: str, **options: Any) -> list[Any]:
    """The values that a command prints, one a line."""
    return [json.loads(line) for line in output_of(broker, *arguments, **options)]


def error_of(done: subprocess.CompletedProcess[str]) -> tuple[int, str]:
    """Exit code and code of the one line on standard error; nothing may be on standard output."""
    assert done.stdout == "", done
    match = re.fullmatch(r"broker: (\w+): .+\n", done.stderr)
    assert match, done
    assert done.stderr[:-1].isprintable(), done
    return done.returncode, match[1]


class Terminal:
    """A command whose standard output is a terminal. A context manager; ends what still runs."""

    def __init__(self, broker: Broker, *arguments: str, width: int = 80, **variables: str) -> None:
        self._terminal, end = pty.openpty()
        fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=end,
            env=environment(broker, **variables),
        )
        os.close(end)
        self.shown = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._terminal)

    def until(self, holds: Callable[[str], bool]) -> str:
        """All that was shown, as soon as that `holds` of it."""
        end = time.monotonic() + PATIENCE_S
        while not holds(self.shown):
            assert self._read(end), f"ended: {self.shown!r}"
        return self.shown

    def all(self) -> list[str]:
        """The lines shown, when the command has ended with success."""
        end = time.monotonic() + PATIENCE_S
        while self._read(end):
            pass
        assert self.process.wait(PATIENCE_S) == 0
        return self.shown.split("\n")[:-1]

    def _read(self, end: float) -> bool:
        ready, _, _ = select.select([self._terminal], [], [], max(0.0, end - time.monotonic()))
        assert ready, f"nothing more came: {self.shown!r}"
        try:
            read = os.read(self._terminal, 65536)
        except OSError:  # what the end of a terminal is on Linux
            return False
        self.shown += read.decode().replace("\r\n", "\n")
        return bool(read)


class Watch:
    """`broker watch` with its output in pipes. A context manager; ends what still runs."""

    def __init__(self, broker: Broker, *arguments: str, **variables: str) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, "watch", *arguments],
            bufsize=0,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(broker, **variables),
        )

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def frame(self) -> Any:
        """The next line, decoded."""
        return json.loads(self._line(self.process.stdout))

    def complaint(self) -> str:
        """The next line on standard error."""
        return self._line(self.process.stderr)

    def interrupt(self) -> tuple[int, bytes, bytes]:
        """Exit code after SIGINT, and what was still printed."""
        self.process.send_signal(signal.SIGINT)
        output, errors = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, output, errors

    def _line(self, pipe: Any) -> str:
        ready, _, _ = select.select([pipe], [], [], PATIENCE_S)
        assert ready, "no line came"
        line: bytes = pipe.readline()
        assert line.endswith(b"\n"), line
        return line.decode()


# Items.


def test_items_come_and_go(any_broker: Broker) -> None:
    names = ["cl", "r1", "m1"]
    value = '{"n":12345678901234567890123,"f":1.0,"e":1e2,"z":-0.0,"t":"\u00e9"}'
    spaced = value.replace(",", " ,\n ").replace(":", " : ")
    created = output_of(any_broker, "set", *names, spaced)
    assert created == [f'{{"old_value":null,"new_value":{value}}}']
    assert output_of(any_broker, "get", *names) == [value]
    assert output_of(any_broker, "list", *names[:2]) == [f'{{"item_id":"m1","value":{value}}}']
    assert values_of(any_broker, "groups", "cl") == ["r1"]
    assert {"id": "cl", "groups": ["r1"]} in values_of(any_broker, "streams")
    one = '{"type": "set", "path": "t", "value": 18446744073709551616}'
    updated = output_of(any_broker, "update", *names, one)
    after = value.replace('"\u00e9"', "18446744073709551616")
    assert updated == [f'{{"old_value":{value},"new_value":{after}}}']
    many = '[{"type": "remove", "path": "t"}, {"type": "remove", "path": "n"}]'
    assert values_of(any_broker, "update", *names, many)[0]["new_value"].keys() == {"f", "e", "z"}
    output_of(any_broker, "delete", *names)
    assert output_of(any_broker, "delete", *names) == ['{"old_value":null}']
    assert output_of(any_broker, "list", *names[:2]) == []
    assert output_of(any_broker, "groups", "cl") == []


def test_a_missing_item_is_no_null(memory_broker: Broker) -> None:
    assert error_of(command(memory_broker, "get", "null", "g", "i")) == (1, "not_found")
    output_of(memory_broker, "set", "null", "g", "i", "null")
    assert output_of(memory_broker, "get", "null", "g", "i") == ["null"]


def test_ops_that_failed(memory_broker: Broker) -> None:
    ops = '[{"type":"set","path":"a","value":1},{"type":"append","path":"a","value":2}]'
    done = command(memory_broker, "update", "ops", "g", "i", ops)
    assert done.returncode == 1
    assert json.loads(done.stdout)["new_value"] == {"a": 1}
    assert re.fullmatch(r"broker: append\.type_mismatch: ops\[1\]: .+\n", done.stderr)


def test_case_50_values_without_id(any_broker: Broker, run: Run) -> None:
    for item_id, value in (("b", '{"n":1}'), ("a", "[2]"), ("", "null")):
        output_of(any_broker, "set", "no-ids", "g", item_id, value)
    assert values_of(any_broker, "list", "no-ids", "g") == [
        {"item_id": "b", "value": {"n": 1}},
        {"item_id": "a", "value": [2]},
        {"item_id": "", "value": None},
    ]

    async def listed() -> None:
        async with await Worker.open(any_broker.worker_url) as worker:
            group = {"stream_name": "no-ids", "group_id": "g"}
            assert await result_of(worker, "stream::list", group) == [{"n": 1}, [2], None]

    run(listed())


def test_case_13_unicode_names(any_broker: Broker) -> None:
    names = (STREAM, GROUP, ITEM)
    value = {"id": ITEM, STREAM: GROUP}
    text = json.dumps(value, ensure_ascii=False)
    with Watch(any_broker, *names) as watch:
        assert watch.frame()["event"]["data"] is None
        assert values_of(any_broker, "set", *names, text)[0]["new_value"] == value
        create = watch.frame()
        assert [create[key] for key in ("streamName", "groupId", "id")] == [*names]
        assert create["event"] == {"type": "create", "data": value}
        output_of(any_broker, "send", STREAM, GROUP, STREAM, text, "--id", ITEM)
        event = {"type": STREAM, "data": value}
        assert watch.frame()["event"] == {"type": "event", "event": event}
        assert watch.interrupt() == (0, b"", b"")
    assert values_of(any_broker, "get", *names) == [value]
    assert values_of(any_broker, "list", *names[:2]) == [{"item_id": ITEM, "value": value}]
    assert values_of(any_broker, "groups", STREAM) == [GROUP]
    assert {"id": STREAM, "groups": [GROUP]} in values_of(any_broker, "streams")
    ops = json.dumps({"type": "set", "path": GROUP, "value": STREAM})
    updated = values_of(any_broker, "update", *names, ops)[0]["new_value"]
    assert updated == value | {GROUP: STREAM}
    assert values_of(any_broker, "delete", *names) == [{"old_value": updated}]


@pytest.mark.parametrize("field", ["stream_name", "group_id", "item_id"])
def test_case_13_name_one_byte_too_long(field: str, memory_broker: Broker) -> None:
    names = {"stream_name": "s", "group_id": "g", "item_id": "i"}
    longest = "\u00e9" * 512
    output_of(memory_broker, "set", *(names | {field: longest}).values(), "1")
    done = command(memory_broker, "set", *(names | {field: "x" + longest}).values(), "1")
    assert error_of(done) == (1, "name_too_long")
    assert all(word in done.stderr for word in (field, "1024", "1025"))


def test_names_and_values_that_look_like_options(memory_broker: Broker) -> None:
    output_of(memory_broker, "set", "--", "--url", "-g", "-", "-1e5")
    assert output_of(memory_broker, "get", "--", "--url", "-g", "-") == ["-1e5"]
    output_of(memory_broker, "set", "options", "g", "i", "-5")
    assert output_of(memory_broker, "get", "options", "g", "i") == ["-5"]


def test_standard_input_and_large_values(any_broker: Broker) -> None:
    value = b'{"t":"%b"}' % (b"x" * (20 * MIB))
    output_of(any_broker, "set", "large", "g", "i", "-", stdin=value)
    assert output_of(any_broker, "get", "large", "g", "i") == [value.decode()]
    (listed,) = output_of(any_broker, "list", "large", "g")
    assert listed == f'{{"item_id":"i","value":{value.decode()}}}'
    ops = b'{"type":"set","path":"t","value":1}'
    updated = values_of(any_broker, "update", "large", "g", "i", "-", stdin=ops)
    assert updated[0]["new_value"] == {"t": 1}
    output_of(any_broker, "send", "large", "g", "ping", "-", stdin=b"[]")
    too_large = b'"%b"' % (b"x" * (65 * MIB))
    done = command(any_broker, "set", "large", "g", "i", "-", stdin=too_large)
    assert error_of(done) == (1, "message_too_large")


# Errors.


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([], "usage"),
        (["nonsense"], "usage"),
        (["get", "s", "g"], "usage"),
        (["get", "s", "g", "i", "j\n\x1b[1m"], "usage"),
        (["get", "s", "g", "i", "--no-such"], "usage"),
        (["get", "s", "g", "i", "--timeout", "0"], "usage"),
        (["get", "s", "g", "i", "--timeout", "nan"], "usage"),
        (["get", "s", "g", "i", "--tok", "x"], "usage"),
        (["get", "s", "g", b"\xff"], "usage"),
        (["completion", "csh"], "usage"),
        (["get", "s", "g", "i", "--url", "http://127.0.0.1"], "url"),
        (["get", "s", "g", "i", "--url", "ws://127.0.0.1:x"], "url"),
        (["get", "s", "g", "i", "--url", "127.0.0.1"], "url"),
        (["watch", "s", "g", "--url", "no\nurl"], "url"),
        (["get", "s", "g", "i", "--token", "a\r\nb: c"], "token"),
        (["set", "s", "g", "i", "hello"], "invalid_json"),
        (["set", "s", "g", "i", ""], "invalid_json"),
        (["set", "s", "g", "i", "NaN"], "invalid_json"),
        (["set", "s", "g", "i", "1 2"], "invalid_json"),
        (["set", "s", "g", "i", "[" * 50_000], "invalid_json"),
        (["set", "s", "g", "i", "-"], "invalid_json"),
        (["send", "s", "g", "t", "{\x1b[1m\n"], "invalid_json"),
        (["update", "s", "g", "i", "[,]"], "invalid_json"),
    ],
)
def test_a_wrong_command_line(arguments: list[Any], code: str, memory_broker: Broker) -> None:
    assert error_of(command(memory_broker, *arguments)) == (2, code)


@pytest.mark.parametrize("text", [b"\xff", b'"\xff"', b'{"a":', b""])
def test_wrong_standard_input(text: bytes, memory_broker: Broker) -> None:
    done = command(memory_broker, "set", "s", "g", "i", "-", stdin=text)
    assert error_of(done) == (2, "invalid_json")


def test_what_the_broker_refuses(memory_broker: Broker) -> None:
    deep = "[" * 200 + "]" * 200
    for arguments in (["set", "s", "g", "i", deep], ["update", "s", "g", "i", '{"type":"nope"}']):
        exit_code, code = error_of(command(memory_broker, *arguments))
        assert (exit_code, code) in [(1, "invalid_message"), (1, "deserialization_error")]


def test_nobody_is_there() -> None:
    (port,) = free_ports(1)
    url = f"ws://127.0.0.1:{port}"
    for arguments in (["streams"], ["watch", "s", "g"]):
        done = command(None, *arguments, BROKER_URL=url, BROKER_STREAM_URL=url)
        assert error_of(done) == (3, "unreachable")
        assert str(port) in done.stderr
    secret = command(None, "streams", "--url", f"ws://me:secret@127.0.0.1:{port}")
    assert "secret" not in secret.stderr


def test_somebody_else_is_there(memory_broker: Broker) -> None:
    swapped = environment(memory_broker)
    urls = {"BROKER_URL": swapped["BROKER_STREAM_URL"], "BROKER_STREAM_URL": swapped["BROKER_URL"]}
    for arguments in (["streams"], ["watch", "s", "g"]):
        done = command(None, *arguments, **urls)
        assert error_of(done) == (3, "invalid_answer")
    metrics = memory_broker.metrics_url.replace("http:", "ws:")
    assert error_of(command(None, "streams", "--url", metrics)) == (3, "unreachable")
    done = command(None, "streams", "--url", memory_broker.worker_url + "/elsewhere")
    assert error_of(done) == (3, "unreachable")


def test_a_broker_that_stands_still() -> None:
    with Broker(IN_MEMORY) as broker:
        gateway = broker.children()["gateway"]
        os.kill(gateway, signal.SIGSTOP)
        try:
            done = command(broker, "streams", "--timeout", "0.5")
        finally:
            os.kill(gateway, signal.SIGCONT)
        assert error_of(done) == (3, "timeout")
        assert "0.5 s" in done.stderr


def test_a_worker_that_never_answers(memory_broker: Broker, run: Run) -> None:
    async def never(_: Invocation) -> None:
        await asyncio.Event().wait()

    async def register() -> Worker:
        worker = await Worker.open(memory_broker.worker_url)
        await worker.register_function("stream::get(hung)", never)
        await worker.barrier()
        return worker

    worker = run(register())
    done = command(memory_broker, "get", "hung", "g", "i", "--timeout", "0.5")
    assert error_of(done) == (3, "timeout")
    run(worker.close())


@contextlib.contextmanager
def reads_nothing() -> Iterator[str]:
    """The URL of a server that accepts one WebSocket and reads nothing of it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        peers: list[socket.socket] = []

        def accept() -> None:
            peer, _ = server.accept()
            peers.append(peer)
            head = b""
            while b"\r\n\r\n" not in head and (read := peer.recv(4096)):
                head += read
            match = re.search(rb"(?i)sec-websocket-key: *(\S+)", head)
            if match is None:  # the client gave up before
                return
            digest = hashlib.sha1(match[1] + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
            answer = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
            answer += b"Connection: Upgrade\r\nSec-WebSocket-Accept: " + base64.b64encode(digest)
            with contextlib.suppress(OSError):
                peer.sendall(answer + b"\r\n\r\n")

        thread = threading.Thread(target=accept)
        thread.start()
        yield f"ws://127.0.0.1:{server.getsockname()[1]}"
        thread.join()
        for peer in peers:
            peer.close()


def test_a_broker_that_takes_nothing() -> None:
    text = b'"%b"' % (b"x" * (32 * MIB))
    with reads_nothing() as url:
        arguments = ["set", "s", "g", "i", "-", "--url", url, "--timeout", "1"]
        assert error_of(command(None, *arguments, stdin=text)) == (3, "timeout")


def test_tokens(run: Run) -> None:
    block = {"name": "iii-stream", "config": {"auth_function": "stream::auth"}}
    settings = yaml.safe_dump({"workers": [block], "broker": {"worker": {"token": "T1"}}})
    seen: list[Any] = []

    def auth(asked: Invocation) -> Any:
        seen.append(asked.data["headers"].get("authorization"))
        return {"context": None} if seen[-1] == "Bearer C1" else {"authorized": False}

    with Broker(settings) as broker:
        assert error_of(command(broker, "streams")) == (1, "unauthorized")
        assert error_of(command(broker, "streams", "--token", "T2")) == (1, "unauthorized")
        assert error_of(command(broker, "streams", "--token", "", III_TOKEN="T1")) == (
            1,
            "unauthorized",
        )
        output_of(broker, "set", "s", "g", "i", "1", "--token", "T1")
        assert output_of(broker, "get", "s", "g", "i", III_TOKEN="T1") == ["1"]

        async def watch() -> None:
            headers = {"Authorization": "Bearer T1"}
            async with await Worker.open(broker.worker_url, headers) as worker:
                await worker.register_function("stream::auth", auth)
                await worker.barrier()
                asks = ["watch", "s", "g"]
                done = await asyncio.to_thread(command, broker, *asks, III_TOKEN="T1")
                assert error_of(done) == (1, "unauthorized")
                assert seen == [None]  # the workers' token is no client's
                with Watch(broker, "s", "g", "--token", "C1") as accepted:
                    assert (await asyncio.to_thread(accepted.frame))["event"]["data"] == [1]
                    assert accepted.interrupt() == (0, b"", b"")

        run(watch())


def test_tls(tmp_path: Path) -> None:
    names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", "key.pem", "-out", "cert.pem"]
    request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    subprocess.run([*request, *files, *names], cwd=tmp_path, check=True, capture_output=True)
    certificate = str(tmp_path / "cert.pem")
    tls = {"tls": {"certificate": certificate, "key": str(tmp_path / "key.pem")}}
    ports = yaml.safe_dump({"broker": {"stream": tls, "worker": tls}})
    with Broker(IN_MEMORY + ports) as broker:
        done = command(broker, "streams")
        assert error_of(done) == (3, "unreachable")
        assert "certificate" in done.stderr
        output_of(broker, "set", "s", "g", "i", "1", SSL_CERT_FILE=certificate)
        with Watch(broker, "s", "g", SSL_CERT_FILE=certificate) as watch:
            assert watch.frame()["event"]["data"] == [1]
            assert watch.interrupt() == (0, b"", b"")
        without = broker.worker_url.replace("wss:", "ws:")
        assert error_of(command(broker, "streams", "--url", without)) == (3, "unreachable")


# Watching.


def test_watch_in_a_pipe(any_broker: Broker) -> None:
    output_of(any_broker, "set", "w", "g", "a", "18446744073709551616")
    with Watch(any_broker, "w", "g") as group, Watch(any_broker, "w", "g", "b") as one:
        assert group.frame()["event"]["data"] == [18446744073709551616]
        assert one.frame()["event"] == {"type": "sync", "data": None}
        output_of(any_broker, "set", "w", "g", "a", "2")
        output_of(any_broker, "set", "w", "g", "b", "3")
        output_of(any_broker, "delete", "w", "g", "b")
        output_of(any_broker, "send", "w", "g", "ping", "{}")
        found = [group.frame() for _ in range(4)]
        assert [(f["id"], f["event"]["type"]) for f in found] == [
            ("a", "update"),
            ("b", "create"),
            ("b", "delete"),
            (None, "event"),
        ]
        assert [one.frame()["event"]["type"] for _ in range(2)] == ["create", "delete"]
        assert group.interrupt() == (0, b"", b"")
        assert one.interrupt() == (0, b"", b"")


def test_watch_goes_on_after_a_restart() -> None:
    with Broker(IN_MEMORY) as broker, Watch(broker, "w", "g") as watch:
        assert watch.frame()["event"]["data"] == []
        assert broker.stop() == 0
        assert re.fullmatch(r"broker: connection_lost: .* 1001.*\n", watch.complaint())
        broker.start()
        assert watch.frame()["event"]["type"] == "sync"
        output_of(broker, "set", "w", "g", "i", "1")
        create = watch.frame()
        assert create["event"] == {"type": "create", "data": 1}
        assert watch.interrupt() == (0, b"", b"")


def test_watch_misses_nothing_when_the_gateway_dies() -> None:
    with Broker(IN_MEMORY) as broker, Watch(broker, "w", "g") as watch:
        watch.frame()
        os.kill(broker.children()["gateway"], signal.SIGKILL)
        assert watch.complaint().startswith("broker: connection_lost: ")
        end = time.monotonic() + PATIENCE_S
        while command(broker, "set", "w", "g", "i", "1").returncode and time.monotonic() < end:
            time.sleep(0.1)
        frame = watch.frame()
        if frame["event"]["type"] == "resume":
            frame = watch.frame()
        assert frame["event"]["data"] in (1, [1])
        output_of(broker, "set", "w", "g", "i", "2")
        update = watch.frame()
        assert (update["event"], update["seq"]) == ({"type": "update", "data": 2}, frame["seq"] + 1)
        assert watch.interrupt() == (0, b"", b"")


def test_watch_ends_while_the_broker_is_away() -> None:
    with Broker(IN_MEMORY) as broker, Watch(broker, "w", "g") as watch:
        watch.frame()
        broker.kill()
        assert watch.complaint().startswith("broker: connection_lost: ")
        assert watch.interrupt() == (0, b"", b"")


def test_a_join_that_is_refused(memory_broker: Broker, run: Run) -> None:
    async def watch() -> None:
        async with await Worker.open(memory_broker.worker_url) as worker:
            await worker.register_function("no", lambda _: {"unauthorized": True})
            await worker.register_trigger("stream:join", "no", {"stream_name": "closed"})
            await worker.barrier()
            done = await asyncio.to_thread(command, memory_broker, "watch", "closed", "g")
            assert error_of(done) == (1, "unauthorized")

    run(watch())
    done = command(memory_broker, "watch", "s", "x" * 1025)
    assert error_of(done) == (1, "name_too_long")


def test_nobody_reads_any_more(memory_broker: Broker) -> None:
    with Watch(memory_broker, "unread", "g") as watch:
        watch.frame()
        assert watch.process.stdout
        watch.process.stdout.close()
        end = time.monotonic() + PATIENCE_S
        while watch.process.poll() is None and time.monotonic() < end:
            output_of(memory_broker, "set", "unread", "g", "i", "1")
        assert watch.process.returncode == 0
        assert watch.process.stderr
        assert watch.process.stderr.read() == b""
        watch.process.stdout = None


def test_a_full_disk(memory_broker: Broker) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*COMMAND, "set", "full", "g", "i", "1"],
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=PATIENCE_S,
            env=environment(memory_broker),
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, b"broker: io: No space left on device\n")


# Terminals.

COLOUR = re.compile(r"\x1b\[[0-9]+m")


def plain(line: str) -> str:
    """A line without colours, which must be all that a terminal obeys in it."""
    line = COLOUR.sub("", line)
    assert line.isprintable(), ascii(line)
    return line


def test_lists_on_a_terminal(memory_broker: Broker) -> None:
    harm = "\x1b[31m\u202e\n\x9b"
    output_of(memory_broker, "set", "tty", GROUP, "a", '{"n":1}')
    output_of(memory_broker, "set", "tty", GROUP, harm, json.dumps(harm, ensure_ascii=False))
    output_of(memory_broker, "set", "tty", GROUP, "long", json.dumps("x" * 99))
    output_of(memory_broker, "set", "tty", harm, "a", "1")
    with Terminal(memory_broker, "list", "tty", GROUP, width=60) as terminal:
        lines = terminal.all()
    assert lines[0] == "\x1b[1m" + "ITEM".ljust(22) + "VALUE\x1b[0m"
    assert [plain(line) for line in lines[1:]] == [
        "a".ljust(22) + '{"n":1}',
        '\\x1b[31m\\u202e\\n\\x9b  "\\u001b[31m\\u202e\\n\\u009b"',
        "long".ljust(22) + '"' + "x" * 36 + "…",
    ]
    with Terminal(memory_broker, "groups", "tty", NO_COLOR="1") as terminal:
        assert terminal.all() == ["\\x1b[31m\\u202e\\n\\x9b", GROUP]
    with Terminal(memory_broker, "streams", NO_COLOR="1") as terminal:
        header, *rows = terminal.all()
    assert header.split() == ["STREAM", "GROUPS", "NAMES"]
    assert any(re.match(r"tty +2 +\\x1b.*, \u90e8\u5c4b 1", row) for row in rows)
    with Terminal(memory_broker, "list", "tty", GROUP, "--json") as terminal:
        lines = terminal.all()
    assert json.loads(plain(lines[1])) == {"item_id": harm, "value": harm}


def test_values_on_a_terminal(memory_broker: Broker) -> None:
    with Terminal(memory_broker, "set", "tty2", "g", "i", '{"n":1.0,"l":[]}') as terminal:
        assert terminal.all() == ["old  null", 'new  {"n":1.0,"l":[]}']
    with Terminal(memory_broker, "get", "tty2", "g", "i") as terminal:
        assert terminal.all() == ["{", '  "n": 1.0,', '  "l": []', "}"]
    with Terminal(memory_broker, "delete", "tty2", "g", "i") as terminal:
        assert terminal.all() == ['old  {"n":1.0,"l":[]}']
    with Terminal(memory_broker, "list", "tty2", "g") as terminal:
        assert terminal.all() == []


def test_watching_on_a_terminal(memory_broker: Broker) -> None:
    names = ("tty3", "g", "i")
    with Terminal(memory_broker, "watch", "tty3", "g") as terminal:
        terminal.until(lambda shown: shown.count("\n") == 1)
        output_of(memory_broker, "set", *names, '{"n":1,"t":"\\u001b[1m"}')
        output_of(memory_broker, "set", *names, '{"n":2,"t":"\\u001b[1m","x":[]}')
        output_of(memory_broker, "send", "tty3", "g", "typing\x9b", "{}")
        output_of(memory_broker, "delete", *names)
        shown = terminal.until(lambda shown: shown.count("\n") == 5)
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.process.wait(PATIENCE_S) == 0
    assert "\x1b[33mupdate\x1b[0m" in shown
    lines = [plain(line) for line in shown.split("\n")[:5]]
    assert all(re.match(r"\d\d:\d\d:\d\d\.\d{3}  ", line) for line in lines)
    assert [" ".join(line.split()[1:]) for line in lines] == [
        "sync - 0 items",
        'create i {"n":1,"t":"\\u001b[1m"}',
        "update i n 1 → 2 +x []",
        "event - typing\\x9b {}",
        'delete i {"n":2,"t":"\\u001b[1m","x":[]}',
    ]


# Configuration and completion.


def test_init(tmp_path: Path) -> None:
    done = command(None, "init", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    written = tmp_path / "broker.yaml"
    text = written.read_text()
    assert error_free(command(None, "check", str(written))) == config.to_yaml(config.Config())
    settings, warnings = config.load(str(written), config.Overrides(), {})
    assert (settings, warnings) == (config.Config(), [])
    again = command(None, "init", cwd=tmp_path)
    assert (again.returncode, again.stdout) == (2, "")
    assert re.fullmatch(r"broker: .*broker\.yaml.*not overwritten\n", again.stderr)
    assert written.read_text() == text
    nowhere = command(None, "init", "no/such/folder.yaml", cwd=tmp_path)
    assert (nowhere.returncode, nowhere.stderr.count("\n")) == (2, 1)


def test_init_shows_every_key(tmp_path: Path) -> None:
    """Its lines in comments, once they are used, are the defaults, and none is missing."""
    written = tmp_path / "mine.yaml"
    assert command(None, "init", str(written)).returncode == 0
    used = re.sub(r"(?m)^( *)#(?=[a-z_]+:)", r"\1", written.read_text())
    written.write_text(used)
    settings, warnings = config.load(str(written), config.Overrides(), {})
    assert (settings.shards, warnings) == (2, [])
    defaults = config.to_yaml(settings)
    assert yaml.safe_load(defaults) == yaml.safe_load(used)
    table = (REPOSITORY / "docs" / "configuration.md").read_text()
    documented = set(re.findall(r"(?m)^\| `(?:\w+\.)?(\w+)`", table)) - {"redis_url", "key_prefix"}
    assert len(documented) > 30
    assert documented <= set(re.findall(r"(\w+):", used))


def error_free(done: subprocess.CompletedProcess[str]) -> str:
    """What a command printed; it must have succeeded."""
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_every_command(shell: str, tmp_path: Path) -> None:
    script = error_free(command(None, "completion", shell))
    assert script == completion(shell)
    assert all(re.search(rf"\b{name}\b", script) for name in COMMANDS)
    dashes = "-l " if shell == "fish" else "--"
    assert all(dashes + name in script for name in ("timeout", "data-dir", "json", "log-level"))
    if (program := shutil.which(shell)) is not None:
        file = tmp_path / "script"
        file.write_text(script)
        subprocess.run([program, "-n", str(file)], check=True, timeout=PATIENCE_S)


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["w"], ["watch"]),
        (["se"], ["serve", "set", "send"]),
        (["completion", "z"], ["zsh"]),
        (["serve", "--log-format", ""], ["text", "json"]),
        (["get", "s", "g", "--t"], ["--token", "--timeout"]),
        (["watch", "--url", "w"], []),
        (["check", "a"], ["a b.yaml", "ab.yaml"]),
        (["serve", "--config", "ab"], ["ab.yaml"]),
    ],
)
def test_bash_completes(words: list[str], found: list[str], tmp_path: Path) -> None:
    for name in ("a b.yaml", "ab.yaml"):
        (tmp_path / name).touch()
    bash = 'source ./script; COMP_WORDS=(broker "$@"); COMP_CWORD=$#; _broker'
    (tmp_path / "script").write_text(completion("bash"))
    done = subprocess.run(
        ["bash", "-c", bash + '; printf "%s\\n" "${COMPREPLY[@]}"', "bash", *words],
        cwd=tmp_path,
        capture_output=True,
        timeout=PATIENCE_S,
        text=True,
        check=True,
    )
    assert sorted(done.stdout.split("\n")[:-1]) == (sorted(found) or [""])
    assert done.stderr == ""


def test_help_names_every_command() -> None:
    shown = error_free(command(None, "--help"))
    assert all(re.search(rf"(?m)^    {name}\b", shown) for name in COMMANDS)
    page = (REPOSITORY / "docs" / "command-line.md").read_text()
    assert all(f"broker {name}" in page for name in COMMANDS)


def test_settings_of_a_call_are_documented(memory_broker: Broker) -> None:
    shown = error_free(command(memory_broker, "get", "--help"))
    assert all(word in shown for word in ("BROKER_URL", "III_TOKEN", "--timeout", "--json"))
    shown = error_free(command(memory_broker, "watch", "--help"))
    assert "BROKER_STREAM_URL" in shown
    assert "III_TOKEN" not in shown
