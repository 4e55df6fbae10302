"""Where a key is in a TOML text: against texts whose lines were counted when they were made."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spilld.errors import ConfigError
from spilld.fields import Int
from spilld.toml_file import TomlFile, line_of

VALUES = [
    "1",
    "true",
    '"k0 = 1 # [k1]"',
    "'''\nk0 = 2\n[k1]\n'''",
    '"""\\\n   k0 = 1"""',
    '"""\n""" # k2 = 1',
    "[\n  1, # k0 = 3\n\n  [2],\n]",
    "[\n[1],\n[2]\n]",
    '{ k0 = 1, k1 = "]" }',
    "1979-05-27T07:32:00Z",
]
GAPS = ["", "# k0 = 1", "  # [k1]", "\t", '# """']
HEADERS = ["[{}]", "  [ {} ]", '["{}"] # k0 = 1', "[{}]\t"]
SETTINGS = ["{} = {}", '  "{}"={}', "'{}' = {} # k0 = 1"]


@st.composite
def documents(draw: st.DrawFn) -> tuple[str, dict[tuple[str, ...], int]]:
    """A text, and the line of each key."""
    lines: list[str] = []
    where: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    for number in range(draw(st.integers(0, 8))):
        lines += draw(st.lists(st.sampled_from(GAPS), max_size=2))
        name = f"k{number}"
        if draw(st.integers(0, 3)) == 0:
            table = (name,)
            where[table] = len(lines) + 1
            lines.append(draw(st.sampled_from(HEADERS)).format(name))
        else:
            where[*table, name] = len(lines) + 1
            form, value = draw(st.sampled_from(SETTINGS)), draw(st.sampled_from(VALUES))
            lines += form.format(name, value).split("\n")
    return "\n".join(lines), where


@given(document=documents(), ending=st.sampled_from(["", "\n"]), carriage=st.booleans())
def test_every_key_is_found_where_it_is(
    document: tuple[str, dict[tuple[str, ...], int]], ending: str, carriage: bool
) -> None:
    text, where = document
    text += ending
    tomllib.loads(text)
    if carriage:
        text = (text + "\n").replace("\n", "\r\n")
    for keys, line in where.items():
        assert line_of(text, keys) == line
        assert line_of(text, (*keys, "none")) is None
    assert line_of(text, ["none"]) is None


@given(text=st.text("[]{}=.,'\"\\#ab1 \n", max_size=40))
def test_what_tomllib_finds_has_a_line(text: str) -> None:
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return
    for key in values:
        line = line_of(text, [key])
        assert line is not None
        assert key in text.split("\n")[line - 1] or not key.isalnum()


@pytest.mark.parametrize(
    ("text", "keys", "line"),
    [
        ("a.b.c = 1", "abc", 1),
        ("a.b.c = 1\na.b.d = 2", "abd", 2),
        ("[a.b]\nc = 1\n[a]\nd = 2", "abc", 2),
        ("[a.b]\nc = 1\n[a]\nd = 2", "ad", 4),
        ("[a.b]\nc = 1\n[a]\nd = 2", "a", 1),
        ("[a]\nb = {c = 1}", "abc", 2),
        ("[[a]]\nb = 1\n[[a]]\nc = 1", "ac", 4),
        ("b = 1\n[a]\nb = 2", "ab", 3),
    ],
)
def test_dots_and_tables(text: str, keys: str, line: int) -> None:
    assert line_of(text, list(keys)) == line


@dataclass(frozen=True, kw_only=True)
class Point:
    x: Annotated[int, Int(0)]
    y: Annotated[int, Int(0)] = 0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[p]\ny = 1\nx = -1", "line 3: x is -1"),
        ("\n[p]\ny = 1", "line 2: x is None; allowed: it must be given"),
        ("[p]\nx = 1\nz = 2", "line 3: unknown 'z'; allowed: x, y"),
        ("p = 1", "line 1: p is 1; allowed: a table of x, y"),
    ],
)
def test_tables_are_read_and_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "file"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        TomlFile(path).read(Point, "p")
    assert str(caught.value).startswith(f"{path}, {says}")
    path.write_text("[p]\nx = 3")
    assert TomlFile(path).read(Point, "p") == Point(x=3)


@given(content=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(content)
    try:
        values = TomlFile(path).values
    except ConfigError as error:
        assert str(path) in error.message  # noqa: PT017 (values are as good)
    else:
        assert isinstance(values, dict)
