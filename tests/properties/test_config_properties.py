"""No configuration makes the reader fail in any way but its own."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from broker import config, config_text
from broker.config import Config, KvAdapter, Overrides, StreamPort
from broker.errors import ConfigError

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=10),
    st.dates(),
    st.sampled_from(["kv", "redis", "${X}", "${X:1}", "in_memory", "redis://h", "2"]),
)
KEYS = """
    modules workers broker class name config adapter port host auth_function store_method
    file_path redis_url key_prefix shards run_dir worker metrics limits name_bytes_max
"""
keys = st.sampled_from(KEYS.split()) | st.text(max_size=5)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)
stream_blocks = st.builds(
    lambda block, broker: {
        "modules": [{"class": "modules::stream::StreamModule", "config": block}],
        "broker": broker,
    },
    values,
    values,
)


@settings(deadline=None)
@given(st.one_of(values, stream_blocks))
def test_load_raises_only_config_errors(document: object) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "broker.yaml"
        path.write_text(yaml.safe_dump(document, allow_unicode=True), encoding="utf-8")
        try:
            loaded, _ = config.load(str(path), Overrides(), {})
        except ConfigError:
            return
        path.write_text(config.to_yaml(loaded))
        assert config.load(str(path), Overrides(), {}) == (loaded, [])


PIECES = r"""
    modules: broker: limits: - [ ] { } , ? : & * &a *a | > # % ! !! !!int !!binary --- ... ' "
    \\ \UFFFFFFFF \ud800 ~ .nan 1e999 0x_ 2020-99-99 1:60 ${X} ${X:1} ${ %YAML <<
"""
pieces = st.sampled_from([*PIECES.split(), "\n", "\n  ", " ", "\t"])
yaml_texts = st.lists(pieces | st.text(max_size=3), max_size=30).map("".join)


@settings(deadline=None)
@given(yaml_texts)
def test_no_text_makes_the_reader_fail_in_another_way(text: str) -> None:
    with contextlib.suppress(ConfigError):
        config_text.read_text(text, "broker.yaml", {"X": "x"})


awkward = st.sampled_from(["${X}", "${X:1}", "1e3", "0o17", "yes", "~", ".inf", "a: b", "- a", "#"])
characters = st.characters(codec="utf-8", exclude_categories=["Cc", "Zl", "Zp"])
texts = awkward | st.text(characters, min_size=1, max_size=20)


@settings(deadline=None)
@given(texts, texts, texts)
def test_every_configuration_survives_the_file_that_shows_it(
    host: str, function: str, folder: str
) -> None:
    shown = Config(
        stream=StreamPort(host=host, auth_function=function),
        adapter=KvAdapter(file_path=folder),
        run_dir=folder,
    )
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "broker.yaml"
        path.write_text(config.to_yaml(shown), encoding="utf-8")
        assert config.load(str(path), Overrides(), {"X": "other"}) == (shown, [])
