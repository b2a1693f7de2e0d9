"""No configuration makes the reader fail in any way but its own."""

from __future__ import annotations

import tempfile
from pathlib import Path

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from broker import config
from broker.config import Overrides
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
    file_path redis_url shards run_dir worker metrics limits name_bytes_max
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
