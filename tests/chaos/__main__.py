"""`python -m tests.chaos [--minutes M] [--seed S]`: episodes of faults, or that of one seed."""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path

from tests.chaos import episode
from tests.sim import history

FAULTS = 12
RANDOM_FIRST = 1_000_000  # seeds below are those of the tests


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, metavar="M", help="at least so long")
    parser.add_argument("--seed", type=int, metavar="S", help="run this one alone")
    parser.add_argument("--faults", type=int, default=FAULTS, metavar="N", help="of each episode")
    parsed = parser.parse_args()
    seed = RANDOM_FIRST + int(time.time()) if parsed.seed is None else parsed.seed
    began = time.monotonic()
    killed = paused = cut = restarted = answered = fired = resumes = 0
    failed: list[int] = []
    while True:
        print(f"seed {seed}", flush=True)
        try:
            outcome = asyncio.run(episode.run(seed, parsed.faults, lambda line: print(" ", line)))
        except AssertionError as error:
            print(f"FAILED: python -m tests.chaos --seed {seed} --faults {parsed.faults}\n{error}")
            failed.append(seed)
        else:
            report = outcome.report
            killed, paused = killed + outcome.killed, paused + outcome.paused
            cut, restarted = cut + outcome.connections_cut, restarted + outcome.restarted
            answered, resumes = answered + outcome.answered, resumes + report.resumes
            fired += report.fired
            if not outcome.ok:
                failed.append(seed)
                path = Path(f"chaos-{seed}.jsonl")
                path.write_bytes(history.dump(outcome.records))
                print(f"FAILED: python -m tests.chaos --seed {seed} --faults {parsed.faults}")
                print("\n".join(outcome.broken), report, f"records: {path}", sep="\n")
        took = (time.monotonic() - began) / 60
        print(
            f"{took:.1f} min: {killed} kills, {paused} pauses, {cut} connections cut, {restarted}"
            f" restarts survived by {answered} answered calls, {resumes} resumes, {fired} trigger"
            f" calls; failed seeds: {failed or 'none'}",
            flush=True,
        )
        if parsed.seed is not None or took >= parsed.minutes:
            return 1 if failed else 0
        seed += 1


if __name__ == "__main__":
    raise SystemExit(main())
