"""The written pages: links lead somewhere, commands exist, and what they list is what there is."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from goals import SCRIPTS

from spilld.__main__ import make_parser
from spilld.config.settings import settings

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page
    for pattern in (
        "*.md",
        *(f"{folder}/**/*.md" for folder in ("bench", "cuda_ext", "daemon", "offload", "systemd")),
    )
    for page in ROOT.glob(pattern)
)
README_LINES = 150
FOLDERS = ("bench/", "cuda_ext/", "daemon/", "offload/", "systemd/", "tests/")
"""Of which the pages name files in code."""
PLACEHOLDERS = ("NAME", "DATE-CARD")

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
TARGET = re.compile(r"^([a-z][a-z-]*):(?!=)", re.MULTILINE)
SEPARATORS = frozenset({";", "&", "&&", "|", ">"})


class Shown(NamedTuple):
    """A page's name, and something that stands in it."""

    page: str
    text: str


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@cache
def prose(page: Path) -> str:
    """Without what is fenced."""
    return FENCE.sub("", page.read_text())


@cache
def anchors(page: Path) -> frozenset[str]:
    """What GitHub calls the headings of a page."""
    headings = HEADING.findall(prose(page))
    return frozenset(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)


def links() -> Iterator[Shown]:
    for page in PAGES:
        for target in LINK.findall(SPAN.sub("", prose(page))):
            yield Shown(name(page), target)


def spans() -> Iterator[Shown]:
    for page in PAGES:
        yield from (Shown(name(page), span) for span in SPAN.findall(prose(page)))


def commands() -> Iterator[tuple[Shown, list[str]]]:
    """Each command of the fenced shell lines, as words, without `sudo`."""
    for page in PAGES:
        for language, text in FENCE.findall(page.read_text()):
            if language == "sh":
                for line in text.replace("\\\n", " ").splitlines():
                    for words in split(line):
                        yield Shown(name(page), line), words


def split(line: str) -> Iterator[list[str]]:
    """The commands of a shell line."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    for word in (*lexer, ";"):
        if word not in SEPARATORS:
            words.append(word)
            continue
        if words[:1] == ["sudo"]:
            words = words[1:]
        if words:
            yield words
        words = []


def make_targets(words: list[str]) -> list[str]:
    """What `make` is asked for: neither options nor variables."""
    return [word for word in words[1:] if not word.startswith("-") and "=" not in word]


def test_shell_lines_are_read_as_a_shell_does() -> None:
    line = 'kill -9 %1; sudo .venv/bin/spilld ask a.txt "Who is it?" & # goes on'
    assert list(split(line)) == [["kill", "-9", "%1"], [".venv/bin/spilld", "ask", "a.txt", "Who is it?"]]
    assert list(split("# only a remark")) == []


def test_the_pages_are_found() -> None:
    found = {name(page) for page in PAGES}
    assert {
        "README.md",
        "CONTRIBUTING.md",
        "bench/README.md",
        "cuda_ext/README.md",
        "systemd/README.md",
    } < found
    assert len(list(commands())) > 40
    assert len(list(links())) > 40


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


@pytest.mark.parametrize("link", sorted(set(links())), ids=" -> ".join)
def test_links_lead_somewhere(link: Shown) -> None:
    if "://" in link.text:
        assert link.text.startswith("https://")
        return
    path, _, fragment = link.text.partition("#")
    target = (ROOT / link.page).parent / path if path else ROOT / link.page
    assert target.is_file(), f"there is no {target}"
    assert not fragment or fragment in anchors(target), f"{path} has {', '.join(sorted(anchors(target)))}"


def test_make_knows_every_target() -> None:
    known = set(TARGET.findall((ROOT / "Makefile").read_text()))
    shown = [(where, words) for where, words in commands() if words[0] == "make"]
    shown += [(where, where.text.split()) for where in spans() if where.text.startswith("make ")]
    assert len(shown) > 10
    for where, words in shown:
        assert set(make_targets(words)) <= known, where


def test_every_command_of_spilld_is_one() -> None:
    """With its options: the parser takes it."""
    shown = [(where, words) for where, words in commands() if Path(words[0]).name == "spilld"]
    assert len(shown) > 30
    for where, words in shown:
        try:
            make_parser().parse_args(words[1:])
        except SystemExit as refused:
            raise AssertionError(f"{where} is refused") from refused


def test_every_command_in_a_sentence_is_one() -> None:
    help_text = make_parser().format_help()
    shown = [where for where in spans() if re.match(r"spilld [a-z]", where.text)]
    assert len(shown) > 20
    for where in shown:
        assert re.search(rf"^ +{where.text.split()[1]} ", help_text, re.MULTILINE), where


def test_python_that_is_shown_compiles() -> None:
    shown = [
        (page, text)
        for page in PAGES
        for language, text in FENCE.findall(page.read_text())
        if language == "python"
    ]
    assert shown
    for page, text in shown:
        compile(text, name(page), "exec")
        for line in text.splitlines():
            if line.startswith("from spilld"):
                exec(line)


def test_files_that_are_named_are_there() -> None:
    shown = [where for where in spans() if where.text.startswith(FOLDERS) and " " not in where.text]
    assert len(shown) > 10
    for where in shown:
        assert Path(where.text).stem in PLACEHOLDERS or (ROOT / where.text).exists(), where


def test_every_benchmark_has_its_question() -> None:
    page = (ROOT / "bench/README.md").read_text()
    for script in SCRIPTS:
        assert script.name in page


def test_every_setting_is_in_its_table() -> None:
    rows = [line for line in (ROOT / "systemd/README.md").read_text().splitlines() if line.startswith("|")]
    named = set(SPAN.findall("\n".join(rows)))
    assert {setting.name for setting in settings()} <= named
