"""What is done to a broker in an episode, and when: drawn from a seed."""

from __future__ import annotations

import random
from typing import Literal, NamedTuple

Kind = Literal["kill", "pause", "cut", "restart"]

SUPERVISOR, GATEWAY, ALL = "supervisor", "gateway", "all"


class Fault(NamedTuple):
    """`kind` happens to `targets`, `after_s` after what was before it is over.

    kill: SIGKILL to all targets at once. pause: SIGSTOP, and SIGCONT after `lasts_s`, which may be
    longer than the broker waits for a process that hangs. cut: TCP connections are reset, `share`
    of them. restart: SIGTERM to the supervisor, and a new start.
    """

    after_s: float
    kind: Kind
    targets: tuple[str, ...] = ()
    lasts_s: float = 0.0
    share: float = 0.0

    def __str__(self) -> str:
        what = " ".join(self.targets)
        if self.kind == "pause":
            what += f" for {self.lasts_s:.1f} s"
        if self.kind == "cut":
            what = f"{self.share:.0%} of the connections"
        return f"{self.kind} {what}".strip()


def plan(seed: int, shards: int, faults: int) -> list[Fault]:
    """The faults of an episode, in order."""
    rng = random.Random(seed)
    names = [*(f"shard-{k}" for k in range(shards)), GATEWAY]
    return [_fault(rng, names) for _ in range(faults)]


def _fault(rng: random.Random, names: list[str]) -> Fault:
    after_s = rng.choice((0.05, 0.5, 1.5))
    kind = rng.random()
    if kind < 0.5:
        targets = rng.choice([(name,) for name in names] + [(SUPERVISOR,), (ALL,), ()])
        if not targets:  # some at once
            targets = tuple(sorted(rng.sample(names, 2)))
        return Fault(after_s, "kill", targets)
    if kind < 0.7:
        return Fault(after_s, "pause", (rng.choice(names),), lasts_s=rng.choice((0.2, 1.0, 4.0)))
    if kind < 0.92:
        return Fault(after_s, "cut", share=rng.choice((0.2, 1.0)))
    return Fault(after_s, "restart")
