"""`stream` triggers, matched where changes are committed (protocol section 9)."""

from __future__ import annotations

from typing import Generic, TypeVar

from broker.messages import AddTrigger

G = TypeVar("G")


class Triggers(Generic[G]):
    """The triggers of all gateways; `G` is what stands for a gateway."""

    def __init__(self) -> None:
        self._by_stream: dict[str, dict[tuple[G, str], AddTrigger]] = {}
        self._streams: dict[tuple[G, str], str] = {}

    def __len__(self) -> int:
        return len(self._streams)

    def add(self, gateway: G, trigger: AddTrigger) -> str | None:
        """Enter `trigger`, in place of the gateway's earlier one with the same id. Returns what
        `remove` does of that one."""
        left = self.remove(gateway, trigger.trigger_id)
        key = (gateway, trigger.trigger_id)
        self._by_stream.setdefault(trigger.stream, {})[key] = trigger
        self._streams[key] = trigger.stream
        return left if left != trigger.stream else None

    def remove(self, gateway: G, trigger_id: str) -> str | None:
        """Take the trigger out, if it is there. Returns its stream when that has no more."""
        key = (gateway, trigger_id)
        stream = self._streams.pop(key, None)
        if stream is None:
            return None
        triggers = self._by_stream[stream]
        del triggers[key]
        if triggers:
            return None
        del self._by_stream[stream]
        return stream

    def remove_all(self, gateway: G) -> list[str]:
        """Take out all triggers of a gateway that is gone. Returns the streams without more."""
        found = [trigger_id for owner, trigger_id in self._streams if owner is gateway]
        left = [self.remove(gateway, trigger_id) for trigger_id in found]
        return [stream for stream in left if stream is not None]

    def matching(self, stream: str, group_id: str, item_id: str | None) -> dict[G, list[str]]:
        """Ids of the triggers that a change fires, by gateway, in order of registration."""
        found: dict[G, list[str]] = {}
        for (gateway, trigger_id), trigger in self._by_stream.get(stream, {}).items():
            if trigger.group_id and trigger.group_id != group_id:
                continue
            if trigger.item_id and trigger.item_id != item_id:
                continue
            found.setdefault(gateway, []).append(trigger_id)
        return found
