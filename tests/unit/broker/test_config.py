"""Reading a configuration: spellings, placeholders, strictness, overrides."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import pytest

from broker import config
from broker.config import Config, KvAdapter, Limits, Overrides, RedisAdapter
from broker.errors import ConfigError

DOCUMENTATION = Path(__file__).parents[3] / "docs" / "configuration.md"

CLASSES = """\
modules:
- class: modules::stream::StreamModule
  config:
    port: ${STREAM_PORT:3112}
    adapter:
      class: modules::stream::adapters::KvStore
      config: {store_method: in_memory}
"""
NAMES = """\
workers:
- name: iii-stream
  config:
    port: ${STREAM_PORT:3112}
    adapter: {name: kv, config: {store_method: in_memory}}
"""


def load(
    tmp_path: Path,
    text: str,
    overrides: Overrides | None = None,
    environ: dict[str, str] | None = None,
) -> tuple[Config, list[str]]:
    path = tmp_path / "broker.yaml"
    path.write_text(text)
    return config.load(str(path), overrides or Overrides(), {} if environ is None else environ)


def refusal(tmp_path: Path, text: str, environ: dict[str, str] | None = None) -> ConfigError:
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, text, environ=environ)
    assert "\n" not in str(raised.value)
    return raised.value


def stream(config_block: str) -> str:
    return f"modules:\n- class: modules::stream::StreamModule\n  config: {config_block}\n"


def adapter(config_block: str, name: str = "KvStore") -> str:
    return stream(
        f"{{adapter: {{class: 'modules::stream::adapters::{name}', config: {config_block}}}}}"
    )


def test_defaults() -> None:
    settings, warnings = config.load(None, Overrides(), {})
    assert warnings == []
    assert settings.adapter == KvAdapter("file_based", "./data/stream_store")
    assert (settings.stream.host, settings.stream.port) == ("0.0.0.0", 3112)
    assert (settings.worker.host, settings.worker.port) == ("127.0.0.1", 49134)
    assert settings.shards >= 2


@pytest.mark.parametrize("text", ["", "modules:\n", "workers: []\n", stream("{adapter: null}")])
def test_nothing_said_means_the_defaults(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, text) == config.load(None, Overrides(), {})


@pytest.mark.parametrize(
    ("environ", "port"), [({}, 3112), ({"STREAM_PORT": "4000"}, 4000)], ids=["unset", "set"]
)
def test_both_spellings_mean_the_same(tmp_path: Path, environ: dict[str, str], port: int) -> None:
    by_class, by_name = (load(tmp_path, t, environ=environ) for t in (CLASSES, NAMES))
    assert by_class == by_name
    assert by_class[0].stream.port == port
    assert by_class[0].adapter == KvAdapter("in_memory")


def test_spellings_may_be_mixed(tmp_path: Path) -> None:
    text = NAMES.replace("workers:", "modules:").replace("name: kv,", "name: kv,")
    assert load(tmp_path, text) == load(tmp_path, CLASSES)


@pytest.mark.parametrize("value", ["abc", "", "70000", "-1", "3.5", "true"])
def test_a_port_that_is_none(tmp_path: Path, value: str) -> None:
    error = refusal(tmp_path, CLASSES, {"STREAM_PORT": value})
    assert error.path == "modules[0].config.port"


def test_placeholders(tmp_path: Path) -> None:
    text = (
        "# ${NOT_SET} in a comment is no placeholder\n"
        + stream("{host: '${HOST:127.0.0.1}', auth_function: '${AUTH:}'}")
        + "broker: {run_dir: 'x/${NAME:}/run'}\n"
    )
    settings, _ = load(tmp_path, text, environ={"NAME": "b"})
    assert settings.stream.host == "127.0.0.1"
    assert settings.stream.auth_function is None
    assert settings.run_dir == "x/b/run"
    error = refusal(tmp_path, "broker: {run_dir: '${NOT_SET}'}\n")
    assert error.path == "broker.run_dir"
    assert "NOT_SET" in str(error)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("moduls: []\n", "moduls"),
        (stream("{prot: 1}"), "modules[0].config.prot"),
        (stream("{port: '43112'}"), "modules[0].config.port"),
        (stream("{auth_function: 5}"), "modules[0].config.auth_function"),
        (stream("{adapter: kv}"), "modules[0].config.adapter"),
        (stream("{adapter: {name: mongo}}"), "modules[0].config.adapter.name"),
        (stream("{adapter: {name: bridge}}"), "modules[0].config.adapter.name"),
        (stream("{adapter: {name: kv, class: x}}"), "modules[0].config.adapter"),
        (stream("{adapter: {config: {}}}"), "modules[0].config.adapter"),
        (stream("{adapter: {name: kv, more: 1}}"), "modules[0].config.adapter.more"),
        (adapter("{store_method: on_tape}"), "modules[0].config.adapter.config.store_method"),
        (adapter("{store_metod: in_memory}"), "modules[0].config.adapter.config.store_metod"),
        (adapter("{file_path: 5}"), "modules[0].config.adapter.config.file_path"),
        (adapter("{redis_url: 'http://x'}", "RedisAdapter"), None),
        (adapter("{key_prefix: a}", "RedisAdapter"), "modules[0].config.adapter.config.key_prefix"),
        (adapter("{key_prefix: 'a:'}"), "modules[0].config.adapter.config.key_prefix"),
        (CLASSES + NAMES, None),
        ("broker: {shards: 0}\n", "broker.shards"),
        ("broker: {shard: 2}\n", "broker.shard"),
        ("broker: {worker: {port: null}}\n", "broker.worker.port"),
        ("broker: {limits: {name_bytes_max: 0}}\n", "broker.limits.name_bytes_max"),
        ("broker: {limits: {no_such: 1}}\n", "broker.limits.no_such"),
        ("workers:\n- name: iii-worker-manager\n  config: {rbac: {}}\n", None),
        ("broker: {shards: 2, shards: 3}\n", "broker.shards"),
        ("broker: [\n", None),
        ("- 1\n", None),
        ("? [a]\n: 1\n", None),
    ],
)
def test_strict_everywhere(tmp_path: Path, text: str, path: str | None) -> None:
    error = refusal(tmp_path, text)
    if path is not None:
        assert error.path == path


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "a: &a [*a]\n",
        "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(9)).replace(
            "*a0", "1"
        ),
        "#" * (1024 * 1024 + 1),
        'broker: {run_dir: "\\ud800"}\n',
        'broker: {run_dir: "a\\u2028b"}\n',
        f"broker: {{shards: {'9' * 6000}}}\n",
        "%YAML 1." + "9" * 5000 + "\n---\n",
    ],
    ids=["deep", "endless", "bomb", "large", "surrogate", "line", "digits", "version"],
)
def test_hostile_files(tmp_path: Path, text: str) -> None:
    assert len(str(refusal(tmp_path, text))) < 400


def test_a_variable_that_the_locale_cannot_name(tmp_path: Path) -> None:
    class Ascii(dict[str, str]):
        """An environment that, as the real one, encodes the names that it is asked for."""

        def get(self, name: str, default: str | None = None) -> str | None:
            name.encode("ascii")
            return super().get(name) or default

    settings, _ = load(tmp_path, "broker: {run_dir: '${NÄME:x}'}\n", environ=Ascii())
    assert settings.run_dir == "x"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        config.load(str(tmp_path / "nowhere.yaml"), Overrides(), {})


def test_what_has_no_meaning_here_is_named_and_ignored(tmp_path: Path) -> None:
    text = adapter("{save_interval_ms: 100, channel_size: 8}") + (
        "- class: modules::api::RestApiModule\n  config: {port: 3111}\n"
        "- name: iii-worker-manager\n  config: {host: 127.0.0.2, port: 5000}\n"
    )
    settings, warnings = load(tmp_path, text)
    assert len(warnings) == 3
    assert [key for key in ("save_interval_ms", "channel_size") if key in " ".join(warnings)]
    assert (settings.worker.host, settings.worker.port) == ("127.0.0.2", 5000)


def test_the_command_line_wins(tmp_path: Path) -> None:
    overrides = Overrides(
        shards=3, data_dir="/d", host="h", port=1, worker_host="w", worker_port=2, metrics_port=3
    )
    settings, _ = load(tmp_path, stream("{port: 9}") + "broker: {shards: 7}\n", overrides)
    assert settings.shards == 3
    assert settings.run_dir == "/d/run"
    assert settings.adapter == KvAdapter("file_based", "/d/stream_store")
    assert (settings.stream.host, settings.stream.port) == ("h", 1)
    assert (settings.worker.host, settings.worker.port, settings.metrics.port) == ("w", 2, 3)


def test_a_password_is_not_shown(tmp_path: Path) -> None:
    text = adapter("{redis_url: 'http://user:hunter2@host'}", "RedisAdapter")
    assert "hunter2" not in str(refusal(tmp_path, text))


def prefixed(prefix: str) -> str:
    return adapter(f"{{key_prefix: {json.dumps(prefix)}}}", "RedisAdapter")


@pytest.mark.parametrize(
    "prefix", ["", "a:", "team:chat:", "é:", "mybroker:", "streams:", "-._/'\"#@:", "x" * 127 + ":"]
)
def test_key_prefixes(tmp_path: Path, prefix: str) -> None:
    settings, _ = load(tmp_path, prefixed(prefix))
    assert settings.adapter == RedisAdapter(key_prefix=prefix)
    assert load(tmp_path, config.to_yaml(settings)) == (settings, [])


def test_a_key_prefix_of_the_environment(tmp_path: Path) -> None:
    text = adapter("{key_prefix: '${PREFIX:}'}", "RedisAdapter")
    environs: list[dict[str, str]] = [{}, {"PREFIX": ""}, {"PREFIX": "a:"}]
    for environ, prefix in zip(environs, ("", "", "a:"), strict=True):
        settings, _ = load(tmp_path, text, environ=environ)
        assert settings.adapter == RedisAdapter(key_prefix=prefix)


@pytest.mark.parametrize(
    "prefix",
    [
        *(
            "a",
            "a:b",
            ":",
            "a::",
            "stream:",
            "broker:",
            "a:stream:",
            "a:broker:b:",
            "a :",
            "a\u00a0:",
        ),
        *("{a}:", "{:", "}:", "*:", "a?:", "[a]:", "a]:", "a\\:", "a\n:", "a:\n", "a\x7f:"),
        *("\u2028:", "\ud800:", "x" * 128 + ":"),
    ],
)
def test_key_prefixes_that_are_refused(tmp_path: Path, prefix: str) -> None:
    error = refusal(tmp_path, prefixed(prefix))
    if prefix != "\ud800:":  # the text of the file is refused before
        assert error.path == "modules[0].config.adapter.config.key_prefix"
    assert "\n" not in str(error)


@pytest.mark.parametrize("text", [CLASSES, adapter("{redis_url: 'redis://r:1'}", "RedisAdapter")])
def test_a_configuration_survives_being_handed_on(tmp_path: Path, text: str) -> None:
    settings, _ = load(tmp_path, text + "broker: {shards: 3, limits: {name_bytes_max: 99}}\n")
    assert config.from_json(config.to_json(settings)) == settings
    assert load(tmp_path, config.to_yaml(settings)) == (settings, [])


def test_the_documentation_has_every_key_and_default() -> None:
    rows = dict(re.findall(r"^\| `([\w.]+)` \|(.*)\|$", DOCUMENTATION.read_text(), re.MULTILINE))
    for field in msgspec.structs.fields(Limits):
        assert f" {field.default} " in rows[field.name].replace("`", " "), field.name
    for key, default in {
        "port": 3112,
        "worker.port": 49134,
        "metrics.port": 9464,
        "run_dir": "./data/run",
        "file_path": KvAdapter().file_path,
        "redis_url": RedisAdapter().redis_url,
        "key_prefix": '""',
    }.items():
        assert f"`{default}`" in rows[key], key
