"""Reads and writes of extents on I/O threads, without state beyond a place, a buffer and a file."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np

from spilld.offload.errors import (
    ExtentCorrupt,
    ReadError,
    WriteFailed,
    WriteRefused,
)
from spilld.offload.system import (
    Bytes,
    Rows,
    SystemCalls,
    read_fully,
    write_fully,
)

from . import extent
from .extent import RunMove, RunPlace

PASSING = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN, errno.EINTR}
"""Errors of a shortage that may pass: they do not mean that the disk has failed."""


class ExtentIO:
    """Reads and writes extents.

    Any thread may call any method, on a place that the owner of the tier holds meanwhile.
    """

    def __init__(self, system: SystemCalls, folder: Path, index_log: Path) -> None:
        self._system = system
        self._folder = folder
        self._index_log = index_log

    def write_extent(self, place: RunPlace, layer: int, records: Bytes, rows: Rows, scratch: Bytes) -> int:
        """Write one layer of a run.

        Args:
            place: Where the run is to lie.
            layer: The layer.
            records: uint8 [any, record_bytes].
            rows: int64 [count], the rows of `records` to write.
            scratch: Page-aligned memory of at least the extent's bytes.

        Returns:
            The extent's checksum.

        Raises:
            WriteFailed: What lies in the place is undefined.
        """
        identity = place.identity
        if len(rows) != identity.count or rows.min() < 0 or rows.max() >= len(records):
            raise ValueError(f"a run of {identity.count} blocks needs that many rows of the records")
        np.take(records, rows, axis=0, out=extent.payload(scratch, identity, layer), mode="clip")
        checksum = extent.seal(scratch, identity, layer)
        self._write(place, layer, scratch)
        return checksum

    def read_extent(self, place: RunPlace, layer: int, buffer: Bytes) -> Bytes:
        """Read and verify one layer of a run.

        Args:
            place: Where the run lies.
            layer: The layer.
            buffer: Page-aligned memory of at least the extent's bytes.

        Returns:
            The records, a view of buffer, uint8 [count, record_bytes].

        Raises:
            ReadError: The system call failed.
            ExtentCorrupt: It returned anything but what was written for this run.
        """
        wanted = buffer[: place.identity.extent_bytes(layer)]
        try:
            count = read_fully(self._system, place.file, wanted, place.offset(layer))
        except OSError as error:
            raise ReadError(f"layer {layer} of run {place.run.hex()}: {error}") from error
        if count < len(wanted):
            raise ExtentCorrupt(f"layer {layer} of run {place.run.hex()}: the file ends within it")
        return extent.verify(wanted, place.identity, layer)

    def copy_extent(self, move: RunMove, layer: int, scratch: Bytes) -> None:
        """Copy one layer of a run to its new place, through memory as read_extent's.

        Raises:
            ReadError: The system call failed; nothing was written.
            ExtentCorrupt: It returned anything but what was written for this run; nothing was written.
            WriteFailed: What lies in the new place is undefined.
        """
        self.read_extent(move.source, layer, scratch)
        self._write(move.target, layer, scratch)

    def sync(self, place: RunPlace) -> None:
        """Make durable what was written to the place.

        Raises:
            WriteFailed: It may not be durable.
        """
        try:
            self._system.fdatasync(place.file)
            if place.fresh:
                self._system.fsync_folder(self._folder)
        except OSError as error:
            raise write_error(f"run {place.run.hex()} may not be durable", error) from error

    def sync_index(self) -> None:
        """Make durable what was committed to the index.

        Raises:
            WriteFailed: It may not be durable.
        """
        try:
            file = self._system.open(self._index_log, os.O_RDONLY)
            try:
                self._system.fdatasync(file)
            finally:
                self._system.close(file)
        except OSError as error:
            raise WriteFailed(f"the index may not be durable: {error}") from error

    def _write(self, place: RunPlace, layer: int, sealed: Bytes) -> None:
        whole = sealed[: place.identity.extent_bytes(layer)]
        try:
            write_fully(self._system, place.file, whole, place.offset(layer))
        except OSError as error:
            raise write_error(f"layer {layer} of run {place.run.hex()}", error) from error


def write_error(what: str, error: OSError) -> WriteFailed:
    """Return the error for a system call that did not write."""
    return (WriteRefused if error.errno in PASSING else WriteFailed)(f"{what}: {error}")
