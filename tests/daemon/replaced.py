"""Files whose contents become others while their size and modification time stay, as after `rsync -t`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from spilld.models.files import digest


def settled(file: Path, contents: bytes, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file whose digest is kept at once, without waiting until it has not changed for a while."""
    monkeypatch.setattr(digest, "_SETTLED_NS", 0)
    file.write_bytes(contents)
    return file


def replace(file: Path, contents: bytes) -> None:
    """By another file."""
    before, new = file.stat(), file.with_name("new")
    new.write_bytes(contents)
    os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
    new.replace(file)
    _check(before, file)


def overwrite(file: Path, contents: bytes) -> None:
    """In place."""
    before = file.stat()
    file.write_bytes(contents)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    _check(before, file)


def _check(before: os.stat_result, file: Path) -> None:
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
