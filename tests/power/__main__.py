"""`python -m tests.power [--cuts N] [--seed S]`: many power cuts, or those of one seed."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sqlite3
import time
import traceback

from broker.errors import BrokerError
from tests.power.lives import run_seed

RANDOM_FIRST = 1_000_000  # seeds below are those of the tests


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.power", description=__doc__)
    parser.add_argument("--cuts", type=int, default=10_000, metavar="N", help="at least so many")
    parser.add_argument("--seed", type=int, metavar="S", help="run this one alone, and show all")
    parser.add_argument("--first", type=int, metavar="S", help="the first seed; else by the time")
    parsed = parser.parse_args()
    if parsed.seed is not None:
        print(f"seed {parsed.seed}: {asyncio.run(run_seed(parsed.seed))} power cuts survived")
        return 0
    logging.disable()  # of syncs that were made to fail
    seed = parsed.first if parsed.first is not None else RANDOM_FIRST + int(time.time())
    print(f"from seed {seed} on", flush=True)
    cuts, failed, began, shown_at = 0, [], time.monotonic(), 0.0
    while cuts < parsed.cuts:
        try:
            cuts += asyncio.run(run_seed(seed))
        except (AssertionError, LookupError, BrokerError, sqlite3.Error):
            failed.append(seed)
            traceback.print_exc()
            print(f"FAILED: python -m tests.power --seed {seed}", flush=True)
            if len(failed) == 10:
                break
        seed += 1
        if (took := time.monotonic() - began) > shown_at + 10:
            shown_at = took
            print(f"{cuts} power cuts survived, {cuts / took * 60:.0f} a minute", flush=True)
    took = time.monotonic() - began
    print(
        f"{cuts} power cuts survived in {took:.0f} s, {cuts / took * 60:.0f} a minute;"
        f" failed seeds: {failed or 'none'}"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
