"""A Redis Cluster, and a Redis with Sentinels, of the tests' own: real servers on this machine."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import Any, Self

import redis

from tests.support.redis_server import CLI, RedisServer

PATIENCE_S = 30.0
NODE_TIMEOUT_MS = 1500

AT_ONCE = ("--repl-diskless-sync-delay", "0")
"""A replica that comes needs not wait for others."""


def until(holds: Callable[[], Any], what: str) -> None:
    """Wait until `holds`; a server that does not answer yet is waited for too."""
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            if holds():
                return
        except redis.RedisError:
            pass
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.05)


class RedisClusterServers:
    """Three masters, each with `replicas`. Use it as a context manager, or call `close`."""

    def __init__(self, replicas: int = 0, *options: str) -> None:
        self.nodes: list[RedisServer] = []
        settings = ["--cluster-enabled", "yes", "--cluster-node-timeout", str(NODE_TIMEOUT_MS)]
        settings += ["--cluster-require-full-coverage", "no", *AT_ONCE]
        try:
            for _ in range(3 * (1 + replicas)):
                node = RedisServer(*settings, *options)
                self.nodes.append(node)
            addresses = [f"127.0.0.1:{node.port}" for node in self.nodes]
            command = [CLI, "--cluster", "create", *addresses, "--cluster-yes"]
            command += ["--cluster-replicas", str(replicas)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            until(self.is_well, "all nodes know of all slots")
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)
        return f"redis+cluster://{hosts}"

    def is_well(self) -> bool:
        """Whether all that run agree that the cluster is complete."""
        running = [node for node in self.nodes if node.process is not None]
        return all(
            node.client.execute_command("CLUSTER INFO").get("cluster_state") == "ok"
            and node.client.info("replication").get("master_link_status", "up") == "up"
            for node in running
        )

    def flush(self) -> None:
        for node in self.nodes:
            if node.client.info("replication")["role"] == "master":
                node.client.flushall()

    def node_of(self, key: str) -> RedisServer:
        """The master that has `key`."""
        number = self.nodes[0].client.execute_command("CLUSTER KEYSLOT", key)
        for node in self.nodes:
            if node.process is None:
                continue
            for start, end, (_, port, *_), *_ in slots_of(node):
                if start <= number <= end:
                    return next(node for node in self.nodes if node.port == port)
        raise AssertionError(f"nobody has {key}")

    def move_slot(self, key: str, target: RedisServer) -> None:
        """Move the slot of `key`, with what is in it, to another master."""
        source = self.node_of(key)
        number = source.client.execute_command("CLUSTER KEYSLOT", key)
        ids = {node.port: node.client.execute_command("CLUSTER MYID") for node in self.nodes}
        setslot = "CLUSTER SETSLOT"
        target.client.execute_command(setslot, number, "IMPORTING", ids[source.port])
        source.client.execute_command(setslot, number, "MIGRATING", ids[target.port])
        while keys := source.client.execute_command("CLUSTER GETKEYSINSLOT", number, 10):
            for one in keys:
                source.client.execute_command("MIGRATE", "127.0.0.1", target.port, one, 0, 5000)
                time.sleep(0.002)  # so that others meet the slot half moved
        for node in (target, source, *self.nodes):
            if node.client.info("replication")["role"] == "master":
                node.client.execute_command(setslot, number, "NODE", ids[target.port])

    def close(self) -> None:
        for node in self.nodes:
            node.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def slots_of(node: RedisServer) -> list[Any]:
    """As `CLUSTER SLOTS` answers."""
    raw: Any = redis.Redis(port=node.port)
    raw.response_callbacks.clear()
    try:
        found: list[Any] = raw.execute_command("CLUSTER SLOTS")
        return found
    finally:
        raw.close()


class SentinelServers:
    """A master with a replica, and three Sentinels that watch them as the service `main`."""

    def __init__(self, password: str | None = None) -> None:
        auth = [*AT_ONCE, *(["--masterauth", password] if password else [])]
        self.master = RedisServer(*auth, password=password)
        self.replica = RedisServer(*auth, password=password)
        self.sentinels: list[RedisServer] = []
        self.password = password
        try:
            self.replica.client.replicaof("127.0.0.1", self.master.port)
            until(self._replicates, "the replica is linked")
            for _ in range(3):
                self.sentinels.append(self._sentinel())
            until(self._agree, "the Sentinels know of each other and of the replica")
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        user = f":{self.password}@" if self.password else ""
        return f"redis+sentinel://{user}{hosts}/main"

    def _sentinel(self) -> RedisServer:
        server = RedisServer(started=False)
        config = server.directory / "sentinel.conf"
        lines = [f"sentinel monitor main 127.0.0.1 {self.master.port} 2"]
        lines += [
            "sentinel down-after-milliseconds main 700",
            "sentinel failover-timeout main 5000",
        ]
        if self.password:
            lines.append(f"sentinel auth-pass main {self.password}")
        config.write_text("\n".join(lines) + "\n")
        server.start_sentinel(config)
        return server

    def _replicates(self) -> bool:
        return bool(self.replica.client.info("replication")["master_link_status"] == "up")

    def _agree(self) -> bool:
        masters = [s.client.execute_command("SENTINEL MASTERS") for s in self.sentinels]
        return all(
            int(found["main"]["num-other-sentinels"]) == 2 and int(found["main"]["num-slaves"]) == 1
            for found in masters
        )

    def close(self) -> None:
        for server in (*self.sentinels, self.replica, self.master):
            server.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
