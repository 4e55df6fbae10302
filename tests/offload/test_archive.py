"""The archive's file: what is written is read again, and every other file is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spilld.offload.archive.file import (
    Archive,
    ArchivedRun,
    Manifest,
    archive_bytes,
    write,
)
from spilld.offload.errors import ArchiveDamaged, ArchiveUnknown
from spilld.offload.record import Element, Format, Layout
from spilld.offload.store_layout import StoreLayout
from spilld.offload.system import Bytes

LAYOUTS = StoreLayout(
    (Layout(Format.K8V4, Element.FLOAT32, 1, 16), Layout(Format.K8V4, Element.FLOAT32, 2, 32))
)
MANIFEST = Manifest(
    LAYOUTS,
    b"f" * 32,
    tuple(range(1300)),
    1290,
    (
        ArchivedRun(b"1" * 16, 1, 2, 3),
        ArchivedRun(b"2" * 16, 3, 9, 12),
        ArchivedRun(b"3" * 16, 16, 6, 20, checkpoint=True),
    ),
    {"words": ["\N{SNOWMAN}", None, 1.5]},
)


def records(run: ArchivedRun, layer: int, into: Bytes) -> None:
    into[:] = np.random.default_rng([run.first, layer]).integers(0, 256, into.shape, np.uint8)


def written(folder: Path, manifest: Manifest = MANIFEST) -> bytes:
    with (folder / "a").open("wb") as file:
        write(file, manifest, records)
    return (folder / "a").read_bytes()


def opened(path: Path, content: bytes) -> Manifest:
    path.write_bytes(content)
    with path.open("rb") as file:
        archive = Archive(file)
        archive.verify()
        return archive.manifest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("archives")


@pytest.fixture(scope="module")
def content(folder: Path) -> bytes:
    return written(folder)


def test_there_and_back(folder: Path, content: bytes) -> None:
    assert len(content) == archive_bytes(MANIFEST)
    (folder / "b").write_bytes(content)
    with (folder / "b").open("rb") as file:
        archive = Archive(file)
        seen: list[tuple[int, int]] = []
        archive.verify(lambda done, total: seen.append((done, total)))
        assert archive.manifest == MANIFEST
        assert len(seen) == 6
        assert seen[-1] == (len(content) - 32, len(content))
        for run in reversed(MANIFEST.runs):
            for layer in (1, 0):
                found = archive.read(run, layer)
                wanted = np.empty_like(found)
                records(run, layer, wanted)
                assert (found == wanted).all()


def test_without_kv(tmp_path: Path) -> None:
    bare = replace(MANIFEST, position=0, runs=())
    assert opened(tmp_path / "b", written(tmp_path, bare)) == bare


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_every_flip_is_refused(folder: Path, content: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(content) - 1) | st.integers(0, 6000))
    bad = bytearray(content)
    bad[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises((ArchiveDamaged, ArchiveUnknown)):
        opened(folder / "bad", bytes(bad))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_every_other_length_is_refused(folder: Path, content: bytes, data: st.DataObject) -> None:
    length = data.draw(st.integers(0, len(content) - 1) | st.integers(0, 6000))
    with pytest.raises(ArchiveDamaged):
        opened(folder / "bad", content[:length])
    with pytest.raises(ArchiveDamaged):
        opened(folder / "bad", content + bytes(length % 5000 + 1))


def test_each_byte_of_the_header_and_the_trailer(folder: Path, content: bytes) -> None:
    for at in (*range(32), *range(len(content) - 32, len(content))):
        bad = bytearray(content)
        bad[at] ^= 1
        with pytest.raises((ArchiveDamaged, ArchiveUnknown)):
            opened(folder / "bad", bytes(bad))


def test_a_later_version_is_named(folder: Path, content: bytes) -> None:
    with pytest.raises(ArchiveUnknown, match="version 3 of the format; this spilld reads 2"):
        opened(folder / "bad", content[:8] + b"\x03" + content[9:])


def test_extents_of_other_archives(folder: Path, content: bytes, tmp_path: Path) -> None:
    """Whole files, but the KV is that of other tokens."""
    other = written(tmp_path, replace(MANIFEST, tokens=(7, *MANIFEST.tokens[1:])))
    assert len(other) == len(content)
    with pytest.raises(ArchiveDamaged, match="foreign or damaged chain hash"):
        opened(folder / "bad", other[:8192] + content[8192:])


@pytest.mark.parametrize(
    "changes",
    [
        {"position": 0},
        {"position": 1301},
        {"runs": ()},
        {"layouts": LAYOUTS.raw},
        {"runs": (ArchivedRun(b"1" * 16, 1, 2, 21),)},
        {"runs": (ArchivedRun(b"1" * 16, -1, 2, 3),)},
        {"runs": (ArchivedRun(b"1" * 16, 1, 0, 3),)},
        {"runs": (ArchivedRun(b"1" * 16, 1, 1 << 40, 3),)},
        {"runs": (ArchivedRun(b"1" * 15, 1, 1, 3),)},
        {"fingerprint": b"short"},
    ],
)
def test_a_manifest_that_makes_no_sense(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        replace(MANIFEST, **changes)  # type: ignore[arg-type]
