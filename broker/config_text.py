"""The text of a configuration file to plain values: YAML, `${VAR:default}`, key paths.

Scalars are read by the rules of YAML 1.2 (`yes`, `1:30`, `010` and dates are text), and only those
kinds come out that JSON has. Whatever the file holds, the only exception is `ConfigError`.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias

import msgspec
import yaml
from msgspec import inspect, structs

from broker.errors import ConfigError

Value: TypeAlias = "bool | int | float | str | list[Value] | dict[str, Value] | None"

FILE_BYTES_MAX = 1024 * 1024
"""Bytes that a configuration file may have."""

DEPTH_MAX = 64
"""Levels of lists and mappings that a configuration may nest, also by way of aliases."""

VALUES_MAX = 100_000
"""Values that a configuration may hold, those behind an alias counted each time."""

_SHOWN_MAX = 80  # characters of a value that an error message repeats
_LINE_LENGTH_MAX = 1 << 30  # characters: texts are never folded
_NUMBER_MAX = 40  # characters; longer digits are no number that any key may hold

_PLAIN_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,79}")
_PLACEHOLDER = re.compile(r"\$\{([^:}\n]*)(?::([^}\n]*))?\}")
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_BASED_INTEGER = re.compile(r"0x[0-9a-fA-F]+|0o[0-7]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL_FLOAT = re.compile(r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}

# All from the first colon (behind `//` if there is one) to the last `@`: a password may hold both.
_USER_INFO = re.compile(r"^((?:[^:@]*://)?[^:@]*:).*@", re.DOTALL)
_PASSWORD_ALONE = re.compile(r"(://[^:@/]*:)[^@]*[^@0-9/][^@]*$", re.DOTALL)
_PASSWORD_QUERY = re.compile(r"(password=)[^&]*", re.IGNORECASE)


def key_path(path: str, key: str) -> str:
    """The path of the key `key` in the block at `path`: `broker.shards`, `broker['a b']`."""
    if not _PLAIN_KEY.fullmatch(key):
        return f"{path}[{shown(key)}]"
    return f"{path}.{key}" if path else key


def shown(value: object) -> str:
    """`value` as an error message may repeat it: one short line, passwords in URLs masked."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case list():
            return f"a list of {len(value)}"
        case dict():
            return f"a mapping of {len(value)}"
        case str():
            text = _USER_INFO.sub(r"\1***@", value)
            text = _PASSWORD_ALONE.sub(r"\1***", text)
            text = repr(_PASSWORD_QUERY.sub(r"\1***", text))
        case _:
            text = repr(value)
    return text if len(text) <= _SHOWN_MAX else text[: _SHOWN_MAX - 1] + "…"


def check_keys(values: Mapping[str, Value], known: Collection[str], path: str) -> None:
    """Refuse a key of the block at `path` that is not `known`.

    Raises:
        ConfigError: names the key, what it holds and the known ones.
    """
    for key, value in values.items():
        if key not in known:
            reason = f"is unknown and holds {shown(value)}, may be one of {', '.join(known)}"
            raise ConfigError(key_path(path, key), reason)


def mapping(values: Mapping[str, Value], key: str, path: str) -> dict[str, Value]:
    """The block `key` of the block at `path`; {} where it is missing or null.

    Raises:
        ConfigError: it is no mapping.
    """
    value = values.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(key_path(path, key), f"holds {shown(value)}, may hold a mapping")
    return value


def convert(value: object, kind: Any, path: str) -> Any:
    """`value` as the type `kind`, its bounds checked.

    Raises:
        ConfigError: names `path`, the value and what it may be.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError:
        reason = f"holds {shown(value)}, may hold {described(kind)}"
        raise ConfigError(path, reason) from None


def converted(
    kind: type[msgspec.Struct], values: Mapping[str, Value], path: str, others: Sequence[str] = ()
) -> dict[str, Any]:
    """The fields of the struct `kind` that the block `values` at `path` has, each converted.

    `others`, the keys that the caller has taken out of `values`, are named when one is unknown.
    """
    kinds = {field.name: field.type for field in structs.fields(kind)}
    check_keys(values, (*kinds, *others), path)
    return {key: convert(value, kinds[key], key_path(path, key)) for key, value in values.items()}


def described(kind: Any) -> str:
    """What a key of the type `kind` may hold: `an integer from 0 to 65535`."""
    return _described(inspect.type_info(kind))


def _described(info: inspect.Type) -> str:
    match info:
        case inspect.IntType():
            return f"an integer from {info.ge} to {info.le}"
        case inspect.FloatType():
            return f"a number from {info.ge} to {info.le}"
        case inspect.StrType():
            return f"text of {info.min_length} to {info.max_length} printable characters"
        case inspect.LiteralType():
            return " or ".join(str(value) for value in info.values)
        case inspect.NoneType():
            return "null"
        case inspect.VarTupleType():
            return f"a list of up to {info.max_length} entries, each {_described(info.item_type)}"
        case inspect.StructType():
            return f"a mapping of {' and '.join(field.name for field in info.fields)}"
        case inspect.UnionType():
            return " or ".join(_described(each) for each in info.types)
    raise AssertionError(f"no key has the type {info}")


def dump(values: Mapping[str, Any]) -> str:
    """`values` as YAML of which `read_text` makes the same, whatever the environment."""
    text = yaml.dump(
        values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=_LINE_LENGTH_MAX
    )
    # Only texts in double quotes hold this: `_Dumper` sees to it. No placeholder is found there.
    return text.replace("${", "\\x24{")


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that would else be read as something else, or as placeholders."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    needs_quotes = "${" in text or read_scalar(text) != text
    style = '"' if needs_quotes else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def read_scalar(text: str) -> bool | int | float | str | None:
    """What a YAML 1.2 scalar without quotes means; text that is nothing else stays as it is."""
    if text in _WORDS:
        return _WORDS[text]
    if len(text) > _NUMBER_MAX:
        return text
    if _INTEGER.fullmatch(text):
        return int(text)
    if _BASED_INTEGER.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    if match := _SPECIAL_FLOAT.fullmatch(text):
        return float("nan" if match[3] else f"{match[1]}inf")
    return text


def read_file(path: str, environ: Mapping[str, str]) -> dict[str, Value]:
    """The mapping that the YAML file at `path` holds, placeholders expanded; {} if it is empty.

    Raises:
        ConfigError: the file cannot be read, is larger than 1 MiB, no UTF-8, no YAML, no mapping,
            has a key twice or a placeholder for a variable that is not set and has no default.
    """
    label = path if path.isprintable() and path else shown(path)
    try:
        with open(path, "rb") as file:
            content = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(label, f"cannot be read: {error.strerror}") from None
    except ValueError:  # a NUL or a lone surrogate in the path
        raise ConfigError(label, "cannot be read: not a name of a file") from None
    if len(content) > FILE_BYTES_MAX:
        raise ConfigError(label, f"has more than {FILE_BYTES_MAX} bytes, may have as many")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(label, f"is not UTF-8 text at byte {error.start}") from None
    return read_text(text, label, environ)


def read_text(text: str, label: str, environ: Mapping[str, str]) -> dict[str, Value]:
    """Like `read_file` for the file's text; errors of the whole file name it by `label`."""
    placeholders = _Placeholders(environ)
    try:
        loader = _Loader(placeholders.hide(text))
        root = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        reason = placeholders.restore(error.problem or "cannot be parsed")
        raise ConfigError(label, f"is not YAML: {place}{' '.join(reason.split())}") from None
    except yaml.reader.ReaderError as error:
        reason = f"character {error.position + 1} is not allowed"
        raise ConfigError(label, f"is not YAML: {reason}") from None
    except (ValueError, OverflowError):  # the parser lets numbers out of range through
        raise ConfigError(label, "is not YAML: a number or an escape is out of range") from None
    if root is None:
        return {}
    values = _Builder(label, placeholders).build(root, "", 0)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(label, f"holds {shown(values)}, may hold a mapping")
    return values


class _Loader(yaml.SafeLoader):
    """Composes nodes; scalars without quotes and tag get the tag `!plain`, read later."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (PyYAML's own attribute)

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Stop before the recursion of PyYAML exhausts the stack."""
        self.depth += 1
        if self.depth > DEPTH_MAX:
            raise yaml.MarkedYAMLError(problem=f"it nests deeper than {DEPTH_MAX} levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_Loader.add_implicit_resolver("!plain", re.compile(""), None)


class _Placeholders:
    """The placeholders of one file, hidden from YAML behind tokens that cannot be forged.

    So braces, colons and `#` in a default disturb no syntax, as they don't where placeholders are
    replaced in the text; and comments and keys are left alone, as what stands there means nothing.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = environ
        self.found: list[re.Match[str]] = []
        self.token_start = f"p{secrets.token_hex(8)}-"
        self.token = re.compile(self.token_start + r"([0-9]+)\.")

    def hide(self, text: str) -> str:
        """`text` with a token for each placeholder."""
        return _PLACEHOLDER.sub(self._hide_one, text)

    def _hide_one(self, match: re.Match[str]) -> str:
        self.found.append(match)
        return f"{self.token_start}{len(self.found) - 1}."

    def restore(self, text: str) -> str:
        """`text` with the placeholders as they were written."""
        return self.token.sub(lambda token: self.found[int(token[1])][0], text)

    def expand(self, text: str, path: str) -> tuple[str, bool]:
        """`text` with the variables' values, and whether it was one placeholder and no more.

        Raises:
            ConfigError: a variable is not set and its placeholder has no default.
        """
        expanded = self.token.sub(lambda token: self._value(self.found[int(token[1])], path), text)
        return expanded, self.token.fullmatch(text) is not None

    def _value(self, placeholder: re.Match[str], path: str) -> str:
        name, default = placeholder.groups()
        try:
            value = self.environ.get(name, default)
        except UnicodeEncodeError:  # a name that no variable can have in this locale
            value = default
        if value is None:
            reason = "a variable that is not set; set it or write ${NAME:default}"
            raise ConfigError(path, f"holds {shown(placeholder[0])}, {reason}")
        return value


class _Builder:
    """Makes plain values of YAML nodes, bounded in depth and number."""

    def __init__(self, label: str, placeholders: _Placeholders) -> None:
        self.label = label
        self.placeholders = placeholders
        self.values = 0

    def build(self, node: yaml.Node, path: str, depth: int) -> Value:
        """The value of `node`, which stands at `path`."""
        self.values += 1
        if self.values > VALUES_MAX:
            raise ConfigError(self.label, f"holds more than {VALUES_MAX} values, may hold as many")
        if depth > DEPTH_MAX:  # an alias within its own anchor
            raise ConfigError(self.label, f"nests deeper than {DEPTH_MAX} levels, may nest as many")
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        match node:
            case yaml.ScalarNode() if kind in ("!plain", "str"):
                return self._scalar(node.value, kind == "!plain", path or self.label)
            case yaml.SequenceNode() if kind == "seq":
                return [
                    self.build(child, f"{path}[{index}]", depth + 1)
                    for index, child in enumerate(node.value)
                ]
            case yaml.MappingNode() if kind == "map":
                return self._mapping(node, path, depth)
        reason = f"holds a value with the tag {shown(node.tag)}, may hold one without"
        raise ConfigError(path or self.label, reason)

    def _scalar(self, text: str, is_plain: bool, path: str) -> Value:
        expanded, was_placeholder = self.placeholders.expand(text, path)
        if was_placeholder:
            expanded = expanded.strip()
            if len(expanded) > 1 and expanded[0] == expanded[-1] and expanded[0] in "'\"":
                return expanded[1:-1]
            return read_scalar(expanded)
        return read_scalar(text) if is_plain and expanded == text else expanded

    def _mapping(self, node: yaml.MappingNode, path: str, depth: int) -> dict[str, Value]:
        values: dict[str, Value] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(path or self.label, "has a key that is no text")
            key = self.placeholders.restore(key_node.value)
            child_path = key_path(path, key)
            if key in values:
                line = key_node.start_mark.line + 1
                raise ConfigError(child_path, f"stands twice (line {line}), may stand once")
            values[key] = self.build(value_node, child_path, depth + 1)
        return values
