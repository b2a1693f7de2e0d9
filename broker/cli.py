"""The command `broker`: its commands and options, and what shells complete of them."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import uvloop

from broker import commands, config, init_config, logs, service, supervisor
from broker.config import Config, Overrides
from broker.config_text import shown
from broker.errors import ConfigError
from broker.output import complain
from broker.report import TOP_MAX
from broker.worker_call import USAGE

TIMEOUT_S = 10.0
TIMEOUT_S_MAX = 86_400.0
_SHELLS = ("bash", "zsh", "fish")
_STREAM = ("stream", "STREAM", "name of a stream")
_GROUP = ("group", "GROUP", "id of a group of it")
_ITEM = ("item", "ITEM", "id of an item of it")
_JSON = ("json_text", "JSON", "a JSON value; - reads it from standard input")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        match options.command:
            case "serve":
                return _serve(options)
            case "check":
                settings = _load(options.config, Overrides())
                print(config.to_yaml(settings), end="")
                return 0
            case "init":
                init_config.write(options.file)
                print(f"wrote {shown(options.file)}; run it: broker serve --config FILE")
                return 0
            case "gateway":
                return _become("gateway", options, ["--index", str(options.index)])
            case "shard":
                return _become("shards", options, ["--index", str(options.index)])
            case "reshard":
                return _on_folder("reshard", options, ["--shards", str(options.shards)])
            case "copy":
                return _copy(options)
            case "backup" | "restore":
                return _on_folder("backup", options, [options.directory], options.command)
            case "completion":
                print(completion(options.shell), end="")
                return 0
            case _:
                return commands.run(options, os.environ)
    except ConfigError as error:
        print(f"broker: {error}", file=sys.stderr)
        return service.CONFIG_EXIT_CODE


class _Parser(argparse.ArgumentParser):
    """Tells what is wrong in one line."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        complain("usage", f"{message} (see {self.prog} --help)")
        raise SystemExit(USAGE)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="broker", description="A stream broker: JSON items, and everyone sees every change."
    )
    found = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = found.add_parser("serve", help="run a whole broker: gateway and shards")
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
    init = found.add_parser("init", help="write a configuration to start from")
    init.add_argument("file", metavar="FILE", nargs="?", default=init_config.DEFAULT_FILE)
    check = found.add_parser("check", help="validate a configuration and print all of it")
    check.add_argument("config", metavar="FILE")
    gateway = found.add_parser("gateway", help="run one gateway process alone")
    gateway.add_argument("--config", metavar="FILE", required=True)
    gateway.add_argument("--index", type=int, default=0, metavar="I", help="from 0 (default)")
    shard = found.add_parser("shard", help="run one shard process alone")
    shard.add_argument("--config", metavar="FILE", required=True)
    shard.add_argument("--index", type=int, required=True, metavar="K", help="from 0")
    for command in (serve, gateway, shard):
        service.add_log_options(command)
    reshard = found.add_parser("reshard", help="spread the data over other shards, offline")
    backup = found.add_parser("backup", help="copy the data, also while the broker runs")
    restore = found.add_parser("restore", help="put a backup in place of no data")
    for command in (reshard, backup, restore):
        command.add_argument("--config", metavar="FILE", help="configuration file (YAML)")
        command.add_argument("--data-dir", metavar="DIR", help="folder of all data")
    reshard.add_argument("--shards", type=int, required=True, metavar="N")
    for command in (backup, restore):
        command.add_argument("directory", metavar="DIR", help="folder of the backup")
    copy = found.add_parser("copy", help="copy all data to another storage, offline")
    for flag, about in (("--from", "whose data is copied"), ("--to", "where it is copied to")):
        config_help = f"configuration {about}"
        copy.add_argument(flag, dest=flag[2:], metavar="FILE", required=True, help=config_help)
    replace = "put it in place of what is there"
    copy.add_argument("--replace", action="store_true", help=replace)
    _add_calls(found)
    shells = found.add_parser("completion", help="print a script that completes commands")
    shells.add_argument("shell", choices=_SHELLS)
    return parser


def _add_calls(found: argparse._SubParsersAction[_Parser]) -> None:
    """The commands that talk to a running broker."""

    def add(name: str, explained: str, *arguments: tuple[str, str, str]) -> _Parser:
        command = found.add_parser(name, help=explained)
        for dest, metavar, about in arguments:
            command.add_argument(dest, metavar=metavar, type=_text, help=about)
        is_watch = name == "watch"
        variable = "BROKER_STREAM_URL" if is_watch else "BROKER_URL"
        default = commands.STREAM_URL if is_watch else commands.WORKER_URL
        port = "stream" if is_watch else "worker"
        url = f"{port} port (default: {variable}, else {default})"
        command.add_argument("--url", metavar="URL", type=_text, help=url)
        token = "sent as Authorization: Bearer" + ("" if is_watch else " (default: III_TOKEN)")
        command.add_argument("--token", metavar="TOKEN", type=_text, help=token)
        timeout = "how long the broker may take (default: 10)"
        command.add_argument(
            "--timeout", metavar="SECONDS", type=_seconds, default=TIMEOUT_S, help=timeout
        )
        lines = "print JSON, one value a line, on a terminal too"
        command.add_argument("--json", action="store_true", help=lines)
        return command

    ops = ("ops", "OPS", "a JSON list of operations, or one; - reads it from standard input")
    kind = ("type", "TYPE", "type of the event")
    add("streams", "list all streams and their groups")
    add("groups", "list the groups of a stream", _STREAM)
    add("list", "list the items of a group", _STREAM, _GROUP)
    add("get", "print an item", _STREAM, _GROUP, _ITEM)
    add("set", "store an item", _STREAM, _GROUP, _ITEM, _JSON)
    add("update", "change an item by operations", _STREAM, _GROUP, _ITEM, ops)
    add("delete", "delete an item", _STREAM, _GROUP, _ITEM)
    send = add("send", "send an event to those who joined", _STREAM, _GROUP, kind, _JSON)
    send.add_argument("--id", metavar="ITEM", type=_text, help="the item that it is about")
    watch = add("watch", "print every change of a group or an item", _STREAM, _GROUP)
    watch.add_argument("item", metavar="ITEM", nargs="?", type=_text, help=_ITEM[2])
    status = add("status", "show how every process is, again and again")
    top = add("top", "show the groups and streams that are used most, again and again")
    for command in (status, top):
        command.add_argument("--once", action="store_true", help="show it once")
        again = "show it again after so long (default: 2 on a terminal; else once)"
        command.add_argument("--interval", metavar="SECONDS", type=_seconds, help=again)
    about = f"how many of each, up to {TOP_MAX} (default: 10)"
    top.add_argument("--limit", metavar="N", type=_limit, default=10, help=about)


def _text(argument: str) -> str:
    try:
        argument.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("holds bytes that are no text") from None
    return argument


def _seconds(argument: str) -> float:
    try:
        seconds = float(argument)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= TIMEOUT_S_MAX:
        reason = f"holds {shown(argument)}, may hold more than 0 and up to {TIMEOUT_S_MAX:g}"
        raise argparse.ArgumentTypeError(reason)
    return seconds


def _limit(argument: str) -> int:
    is_number = argument.isascii() and argument.isdecimal() and len(argument) < 10
    if not is_number or not 1 <= int(argument) <= TOP_MAX:
        reason = f"holds {shown(argument)}, may hold an integer from 1 to {TOP_MAX}"
        raise argparse.ArgumentTypeError(reason)
    return int(argument)


def _serve(options: argparse.Namespace) -> int:
    overrides = Overrides(
        log_level=options.log_level,
        log_format=options.log_format,
        shards=options.shards,
        data_dir=options.data_dir,
        host=options.host,
        port=options.port,
        worker_host=options.worker_host,
        worker_port=options.worker_port,
        metrics_port=options.metrics_port,
    )
    settings = _load(options.config, overrides)
    logs.configure(supervisor.NAME, settings.log_format, settings.log_level)

    def load() -> Config:
        return _load(options.config, overrides)

    again = None if options.config is None else load
    return uvloop.run(supervisor.serve(settings, again))


def _load(path: str | None, overrides: Overrides) -> Config:
    settings, warnings = config.load(path, overrides, os.environ)
    for warning in warnings:
        print(f"broker: warning: {warning}", file=sys.stderr)
    return settings


def _become(module: str, options: argparse.Namespace, more: list[str]) -> int:
    """Run the process in place of this one, so that it has this one's pid."""
    arguments = [sys.executable, "-m", module, "--config", options.config, *more]
    os.execv(sys.executable, [*arguments, *_log_options(options)])


def _on_folder(module: str, options: argparse.Namespace, more: list[str], *first: str) -> int:
    """Run a command on the data, in place of this process."""
    given = [
        word
        for flag, value in (("--config", options.config), ("--data-dir", options.data_dir))
        if value is not None
        for word in (flag, value)
    ]
    os.execv(sys.executable, [sys.executable, "-m", f"shards.{module}", *first, *given, *more])


def _copy(options: argparse.Namespace) -> int:
    """Run `broker copy`, in place of this process."""
    words = ["--from", getattr(options, "from"), "--to", options.to]
    words += ["--replace"] if options.replace else []
    os.execv(sys.executable, [sys.executable, "-m", "shards.copy", *words])


def _log_options(options: argparse.Namespace) -> list[str]:
    given = (("--log-format", options.log_format), ("--log-level", options.log_level))
    return [word for flag, value in given if value is not None for word in (flag, value)]


# Completion: scripts that know every command, its options and the words that these take.


def completion(shell: str) -> str:
    """The script that makes `shell`, one of bash, zsh and fish, complete `broker`."""
    (found,) = (a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
    parsers: dict[str, argparse.ArgumentParser] = found.choices
    explained = {choice.dest: choice.help or "" for choice in found._choices_actions}
    scripts = {"bash": _bash, "zsh": _zsh, "fish": _fish}
    return "\n".join([*scripts[shell](parsers, explained), ""])


_Parsers = dict[str, argparse.ArgumentParser]
_Texts = dict[str, str]


def _bash(parsers: _Parsers, _explained: _Texts) -> Iterator[str]:
    yield "# bash completion of broker: source <(broker completion bash)"
    yield "_broker() {"
    yield "    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]}"
    yield "    local words= files="
    yield "    case $COMP_CWORD:${COMP_WORDS[1]} in"
    yield f'    1:*) words="{" ".join(parsers)}" ;;'
    for name, parser in parsers.items():
        yield f"    *:{name})"
        yield "        case $before in"
        for action in _options(parser):
            if action.nargs != 0:
                flags = "|".join(action.option_strings)
                yield f'        {flags}) words="{_words(action)}" files={_is_file(action)} ;;'
        words = [flag for action in _options(parser) for flag in action.option_strings]
        positional = [action for action in parser._actions if not action.option_strings]
        words += [_words(action) for action in positional if action.choices]
        takes_files = "1" if any(map(_is_file, positional)) else ""
        yield f'        *) words="{" ".join(words)}" files={takes_files} ;;'
        yield "        esac ;;"
    yield "    esac"
    yield '    COMPREPLY=($(compgen -W "$words" -- "$word"))'
    yield "    local IFS=$'\\n'"
    yield '    [[ -n $files ]] && COMPREPLY+=($(compgen -f -- "$word"))'
    yield "}"
    yield "complete -o filenames -F _broker broker"


def _zsh(parsers: _Parsers, explained: _Texts) -> Iterator[str]:
    yield "#compdef broker"
    yield "# zsh completion of broker: source <(broker completion zsh)"
    yield "_broker() {"
    yield "  local -a commands=("
    for name, about in explained.items():
        yield f"    {_quoted(f'{name}:{about}')}"
    yield "  )"
    yield "  if (( CURRENT == 2 )); then _describe command commands; return; fi"
    yield "  local command=$words[2]"
    yield "  shift words; (( CURRENT-- ))"
    yield "  case $command in"
    for name, parser in parsers.items():
        yield f"  {name}) _arguments \\"
        for action in parser._actions:
            about = _zsh_text(action.help or action.dest)
            taken = f":{_zsh_text(str(action.metavar or action.dest))}:{_zsh_values(action)}"
            if not action.option_strings:
                optional = ":" if action.nargs == "?" else ""
                yield f"    {_quoted(optional + taken)} \\"
            for flag in action.option_strings:
                yield f"    {_quoted(f'{flag}[{about}]' + ('' if action.nargs == 0 else taken))} \\"
        yield "    ;;"
    yield "  esac"
    yield "}"
    yield 'if [[ $funcstack[1] == _broker ]]; then _broker "$@"; else compdef _broker broker; fi'


def _fish(parsers: _Parsers, explained: _Texts) -> Iterator[str]:
    yield "# fish completion of broker: broker completion fish | source"
    yield "complete -c broker -f"
    for name, about in explained.items():
        yield f"complete -c broker -n __fish_use_subcommand -a {name} -d {_fish_quoted(about)}"
    for name, parser in parsers.items():
        start = f"complete -c broker -n '__fish_seen_subcommand_from {name}'"
        for action in parser._actions:
            values = f" -a {_fish_quoted(_words(action))}" if action.choices else ""
            files = " -F" if _is_file(action) else ""
            if not action.option_strings and (values or files):
                yield start + values + files
            for flag in action.option_strings:
                dashes = "-l" if flag.startswith("--") else "-s"
                takes = "" if action.nargs == 0 else " -r -F" if files else " -x"
                about = _fish_quoted(action.help or "")
                yield f"{start} {dashes} {flag.lstrip('-')}{takes}{values} -d {about}"


def _options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in parser._actions if action.option_strings]


def _words(action: argparse.Action) -> str:
    return " ".join(map(str, action.choices or ()))


def _is_file(action: argparse.Action) -> str:
    return "1" if action.metavar in ("FILE", "DIR") else ""


def _zsh_values(action: argparse.Action) -> str:
    if _is_file(action):
        return "_files"
    return f"({_words(action)})" if action.choices else " "


def _zsh_text(text: str) -> str:
    return "".join(f"\\{c}" if c in "[]:\\" else c for c in text)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


if __name__ == "__main__":
    raise SystemExit(main())
