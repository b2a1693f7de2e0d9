"""The units under a real systemd, as PID 1 of namespaces of its own, with all their hardening.

Needs root, the right to make namespaces and an overlay, and systemd; is skipped elsewhere.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.broker import REPOSITORY

BOOT = Path(__file__).parent / "systemd" / "boot.sh"
SYSTEMD = Path("/lib/systemd/systemd")
NAMESPACES = ["--pid", "--fork", "--mount", "--net", "--cgroup", "--ipc", "--uts", "--kill-child"]
TIMEOUT_S = 110

INSIDE = r"""
broker=/opt/broker/bin/broker
export LD_LIBRARY_PATH=/opt/python/lib BROKER_URL=ws://127.0.0.1:49134
say() { echo "$1=$2"; }
show() { systemctl show "$1" -p "$2" --value; }
trap "journalctl --no-pager > /tmp/share/journal" EXIT
units="broker-gateway broker-shard@0 broker-shard@1"
report() { $broker status | /opt/broker/bin/python3 -c "import json, sys; print($1)" ; }
status='(lambda s: s["ready"])(json.load(sys.stdin))'

say first "$(ps -p 1 -o comm=)"
systemctl start broker.service; say started $?
say text "$(show broker.service StatusText)"
say owner "$(stat -c %U /run/broker/shard-0.sock) $(stat -c %U /var/lib/broker/stream_store)"
say uid "$(stat -c %U /proc/$(show broker.service MainPID))"
$broker set chat room m 1 > /dev/null; say set $?
say ready "$(report "$status")"

sed -i 's/^broker:/broker:\n  log_level: debug/' /etc/broker/broker.yaml
systemctl reload broker.service; say reloaded $?
say lines "$(journalctl -u broker.service --no-pager | grep -c config_reloaded)"

pid=$(show broker.service MainPID)
[ "$pid" = 0 ] || kill -9 "$pid"
# As soon as it is started again the other form takes its place.
until $broker get chat room m > /dev/null 2>&1; do sleep 0.05; done
systemctl start broker.target
systemctl start broker.target $units; say target $?
say states "$(systemctl is-active broker.service broker.target $units | xargs)"
say value "$($broker get chat room m)"
systemctl restart broker-shard@0; say shard $?
say value_after "$($broker get chat room m)"

systemctl start broker.service; say back $?
say states_back "$(systemctl is-active broker.service broker-gateway broker-shard@0 | xargs)"
say value_back "$($broker get chat room m)"
systemctl stop broker.service; say stopped $?
say result "$(show broker.service Result) $(show broker.service ExecMainStatus)"
"""


def possible() -> bool:
    """Whether this machine lets us."""
    if os.geteuid() or not SYSTEMD.exists() or shutil.which("unshare") is None:
        return False
    if "overlay" not in Path("/proc/filesystems").read_text():
        return False
    mounts = Path("/proc/self/mountinfo").read_text()
    if " - cgroup " not in mounts:  # booted with the second version, which is set up otherwise
        return False
    made = subprocess.run(["unshare", *NAMESPACES, "true"], capture_output=True, check=False)
    return made.returncode == 0


@pytest.mark.skipif(not possible(), reason="no namespaces, or no systemd, to be had")
def test_units(tmp_path: Path) -> None:
    """Start, reload, kill, both forms in turn, restart of a shard, stop."""
    (tmp_path / "inside.sh").write_text(INSIDE)
    done = subprocess.run(
        ["unshare", *NAMESPACES, "sh", BOOT, REPOSITORY, tmp_path],
        capture_output=True,
        check=False,
        text=True,
        timeout=TIMEOUT_S,
    )
    output = tmp_path / "output"
    assert output.exists(), done.stdout + done.stderr
    lines = [line.partition("=") for line in output.read_text().splitlines()]
    said = {name: value for name, _, value in lines}
    journal = tmp_path / "journal"
    told = output.read_text() + (tmp_path / "errors").read_text()
    told += journal.read_text() if journal.exists() else ""
    text = said.pop("text", "")
    assert text.startswith("ready stream=ws://0.0.0.0:3112 worker=ws://127.0.0.1:49134"), told
    assert said == {
        "first": "systemd",
        "started": "0",
        "owner": "broker broker",
        "uid": "broker",
        "set": "0",
        "ready": "True",
        "reloaded": "0",
        "lines": "4",
        "target": "0",
        "states": "inactive active active active active",
        "value": "1",
        "shard": "0",
        "value_after": "1",
        "back": "0",
        "states_back": "active inactive inactive",
        "value_back": "1",
        "stopped": "0",
        "result": "success 0",
    }, told
