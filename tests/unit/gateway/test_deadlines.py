"""Calls that are not answered in time are told, in the order in which they were made."""

from __future__ import annotations

import asyncio

from gateway.deadlines import Deadlines


def test_late_calls_are_told_in_order() -> None:
    async def scenario() -> None:
        late: list[str] = []
        deadlines = Deadlines(0.01, late.append)
        for name in "abcd":
            deadlines.add(name)
        deadlines.discard("b")
        deadlines.discard("never made")
        assert (len(deadlines), late) == (3, [])
        while len(deadlines):
            await asyncio.sleep(0.002)
        assert late == ["a", "c", "d"]

    asyncio.run(scenario())


def test_one_timer_serves_calls_that_come_while_it_runs() -> None:
    """Also when the call that it was set for is answered, and after it found nothing."""

    async def scenario() -> None:
        late: list[str] = []
        deadlines = Deadlines(0.01, late.append)
        for name in ("a", "b", "c"):
            deadlines.add(name)
            deadlines.add(f"{name} late")
            deadlines.discard(name)
            while len(deadlines):
                await asyncio.sleep(0.002)
        deadlines.add("d")
        await asyncio.sleep(0.005)
        deadlines.add("e")
        deadlines.discard("d")
        while len(deadlines):
            await asyncio.sleep(0.002)
        assert late == ["a late", "b late", "c late", "e"]

    asyncio.run(scenario())


def test_a_call_made_because_another_was_late() -> None:
    async def scenario() -> None:
        late: list[str] = []

        def again(name: str) -> None:
            late.append(name)
            if len(late) < 3:
                deadlines.add(f"{name}'")

        deadlines = Deadlines(0.005, again)
        deadlines.add("a")
        while len(late) < 3:
            await asyncio.sleep(0.002)
        assert late == ["a", "a'", "a''"]
        assert len(deadlines) == 0

    asyncio.run(scenario())
