"""What a client costs the gateway that joined a group and does nothing else:
`python -m bench.idle_clients`. Prints resident memory per client."""

from __future__ import annotations

import argparse
import asyncio

import uvloop

from bench.broker import resident_kib, running
from bench.stalled_subscriber import Subscriber

WARM_UP = 500
"""Clients that come before memory is looked at first."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=4000)
    options = parser.parse_args()
    with running("in_memory") as broker:
        gateway = next(pid for pid, role in broker.roles.items() if role == "gateway")
        grew = uvloop.run(run(options.clients, broker.stream_port, gateway))
    print(f"{grew / options.clients:.1f} KiB of the gateway's memory per idle client")
    return 0


async def run(clients: int, port: int, gateway: int) -> float:
    """What the gateway grew by, in KiB, for `clients` clients after the first ones."""
    loop = asyncio.get_running_loop()
    held = []
    for _ in range(WARM_UP):
        held.append(await loop.create_connection(lambda: Subscriber(None), "127.0.0.1", port))
    await asyncio.sleep(1)
    before = resident_kib(gateway)
    for _ in range(clients):
        held.append(await loop.create_connection(lambda: Subscriber(None), "127.0.0.1", port))
    await asyncio.sleep(2)
    return resident_kib(gateway) - before


if __name__ == "__main__":
    raise SystemExit(main())
