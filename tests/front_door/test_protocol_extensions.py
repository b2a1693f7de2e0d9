"""The examples in docs/protocol-extensions.md, sent and compared as they stand there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import Run
from tests.front_door.test_access import auth_worker, configured
from tests.support.broker import REPOSITORY, Broker
from tests.support.calls import item, result_of
from tests.support.stream_client import StreamClient

PAGE = (REPOSITORY / "docs" / "protocol-extensions.md").read_text()
BLOCKS = [
    [json.loads(line) for line in block.splitlines()]
    for block in re.findall(r"^```json\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
]


@pytest.fixture(scope="module")
def broker() -> Iterator[Broker]:
    with Broker(configured()) as broker:
        yield broker


def filled(value: Any, epoch: str) -> Any:
    """`value` with the epoch of the running broker in place of `<epoch>`."""
    return json.loads(json.dumps(value).replace("<epoch>", epoch))


def test_every_example_is_answered_as_it_says(broker: Broker, run: Run) -> None:
    async def main() -> None:
        worker = await auth_worker(broker, {})
        for name in ("m1", "m2"):
            await result_of(worker, "stream::set", item("chat", "room-1", name, data={"id": name}))
        async with await StreamClient.open(broker.stream_url) as client:
            epoch = (await client.join("chat", "room-1"))["epoch"]
            assert len(BLOCKS) == 10
            for (question,), answers in zip(BLOCKS[::2], BLOCKS[1::2], strict=True):
                await client.send(filled(question, epoch))
                for expected in filled(answers, epoch):
                    frame = await client.next()
                    assert isinstance(frame.pop("timestamp"), int)
                    assert expected.pop("timestamp") == "<ts>"
                    assert frame == expected
            await client.quiet()
            assert client.waiting == []
        await worker.close()

    run(main())


def test_every_close_code_is_named() -> None:
    for code in (1001, 1009, 4401, 4403, 4408):
        assert re.search(rf"^\| {code} \|", PAGE, re.MULTILINE)
