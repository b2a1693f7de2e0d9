"""Names as file names: different for different streams, and nothing but a name of a file."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from broker.errors import InvalidRequest
from broker.names import NAME_BYTES_MAX, check_name, file_name, stream_of_file_name

FILE_NAME_BYTES_MAX = 255
SUFFIX = ".db-journal"
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=300) | st.text(
    "./\\%~:aA\0\n\u00e9", max_size=12
)


@given(names)
@example("")
@example(".")
@example("..")
@example("/")
@example("%")
@example("%~")
@example("a" * 1024)
@example("\u00e9" * 512)
def test_a_file_name_is_safe(name: str) -> None:
    escaped = file_name(name)
    assert escaped.isascii()
    assert escaped.isprintable()
    assert not set(escaped) & set("/\\:*?\"<>| '")
    assert escaped[0] != "."
    assert 0 < len(escaped + SUFFIX) <= FILE_NAME_BYTES_MAX


@given(names)
@example("")
@example(".db")
def test_a_file_name_leads_back(name: str) -> None:
    found = stream_of_file_name(file_name(name))
    assert found == name or (found is None and len(file_name(name)) == 200)


@given(names, names)
@example("", "%")
@example("a", "A")
@example("\u00e9", "e\u0301")
@example(".", "%2E")
@example("x" * 1000, "x" * 1001)
def test_different_names_have_different_file_names(one: str, other: str) -> None:
    assert (file_name(one) == file_name(other)) == (one == other)


def test_a_cut_name_is_never_that_of_another_stream() -> None:
    """A stream that is called as the file of a long one."""
    cut = file_name("x" * 1000)
    assert stream_of_file_name(cut) is None
    assert file_name(cut) != cut


@pytest.mark.parametrize("name", ["", "x" * NAME_BYTES_MAX, "\u00e9" * (NAME_BYTES_MAX // 2)])
def test_names_up_to_the_limit_are_accepted(name: str) -> None:
    check_name("field", name)


@pytest.mark.parametrize(
    "name", ["x" * (NAME_BYTES_MAX + 1), "x" + "\u00e9" * (NAME_BYTES_MAX // 2), "\U0001f4a1" * 257]
)
def test_a_longer_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        check_name("stream_name", name)
    error = refused.value
    assert (error.code, error.field) == ("name_too_long", "stream_name")
    for part in ("stream_name", str(len(name.encode())), str(NAME_BYTES_MAX)):
        assert part in error.message


def test_the_limit_can_be_another() -> None:
    check_name("field", "abcd", 4)
    with pytest.raises(InvalidRequest):
        check_name("field", "abcde", 4)
