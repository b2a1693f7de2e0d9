"""What was measured, as JSON: the newest row of every scenario."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from bench.broker import REPOSITORY
from bench.plot import svg
from bench.scenarios import SCENARIOS

RESULTS = Path(__file__).parent / "results"


@dataclass
class Results:
    """Rows by the name of their scenario."""

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """What is in the file, which need not exist."""
        try:
            return cls(json.loads(Path(path).read_text()))
        except FileNotFoundError:
            return cls()

    def write(self, path: str | Path) -> None:
        """Write the rows, and beside them a picture of them."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(self.rows, indent=1, sort_keys=True) + "\n")
        known = {name: self.rows[name] for name in SCENARIOS if name in self.rows}
        target.with_suffix(".svg").write_text(svg(known))


def revision() -> str:
    """The commit that is measured, with + when files differ from it."""
    git = ["git", "-C", str(REPOSITORY)]
    try:
        head = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True).strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + "+" * bool(changed)


def machine() -> str:
    """Cores, processor and Python."""
    model = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return f"{os.cpu_count()} cores, {model}, Python {platform.python_version()}"
