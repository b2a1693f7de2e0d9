"""The command `broker`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import uvloop

from broker import config, logs, service, supervisor
from broker.config import Config, Overrides
from broker.errors import ConfigError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = _parser().parse_args(arguments)
    try:
        match options.command:
            case "serve":
                return _serve(options)
            case "check":
                settings = _load(options.config, Overrides())
                print(config.to_yaml(settings), end="")
                return 0
            case "gateway":
                return _become("gateway", options, [])
            case _:
                return _become("shards", options, ["--index", str(options.index)])
    except ConfigError as error:
        print(f"broker: {error}", file=sys.stderr)
        return service.CONFIG_EXIT_CODE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="broker", description="A stream broker: JSON items, and everyone sees every change."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="run a whole broker: gateway and shards")
    serve.add_argument("--config", metavar="FILE", help="configuration file (YAML)")
    serve.add_argument("--shards", type=int, metavar="N", help="number of shard processes")
    serve.add_argument("--data-dir", metavar="DIR", help="folder of all data (default: ./data)")
    serve.add_argument("--host", help="address of the stream port")
    serve.add_argument("--port", type=int, help="stream port")
    serve.add_argument("--worker-host", metavar="HOST", help="address of the worker port")
    serve.add_argument("--worker-port", type=int, metavar="PORT", help="worker port")
    serve.add_argument(
        "--metrics-port", type=int, metavar="PORT", help="the gateway's; shard K has PORT + 1 + K"
    )
    check = commands.add_parser("check", help="validate a configuration and print all of it")
    check.add_argument("config", metavar="FILE")
    gateway = commands.add_parser("gateway", help="run the gateway process alone")
    gateway.add_argument("--config", metavar="FILE", required=True)
    shard = commands.add_parser("shard", help="run one shard process alone")
    shard.add_argument("--config", metavar="FILE", required=True)
    shard.add_argument("--index", type=int, required=True, metavar="K", help="from 0")
    for command in (serve, gateway, shard):
        service.add_log_options(command)
    return parser


def _serve(options: argparse.Namespace) -> int:
    logs.configure("supervisor", options.log_format, options.log_level)
    overrides = Overrides(
        shards=options.shards,
        data_dir=options.data_dir,
        host=options.host,
        port=options.port,
        worker_host=options.worker_host,
        worker_port=options.worker_port,
        metrics_port=options.metrics_port,
    )
    settings = _load(options.config, overrides)
    return uvloop.run(supervisor.serve(settings, _log_options(options)))


def _load(path: str | None, overrides: Overrides) -> Config:
    settings, warnings = config.load(path, overrides, os.environ)
    for warning in warnings:
        print(f"broker: warning: {warning}", file=sys.stderr)
    return settings


def _become(module: str, options: argparse.Namespace, more: list[str]) -> int:
    """Run the process in place of this one, so that it has this one's pid."""
    arguments = [sys.executable, "-m", module, "--config", options.config, *more]
    os.execv(sys.executable, [*arguments, *_log_options(options)])


def _log_options(options: argparse.Namespace) -> list[str]:
    return ["--log-format", options.log_format, "--log-level", options.log_level]


if __name__ == "__main__":
    raise SystemExit(main())
