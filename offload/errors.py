"""What can go wrong in the tiered store.

OffloadError
├── BudgetTooSmall      a budget cannot hold what one request needs at the least
├── MemoryRefused       the kernel does not give what a budget says
├── FolderUnusable      the state folder is missing its parent, or cannot be written
│   └── FolderInUse     another daemon holds it
├── IndexDamaged        the index of the disk tier cannot be read: what it named is lost
├── TierFull            a tier has no room now; may pass once something is released
├── WriteFailed         a run could not be made durable; it is absent, earlier runs are intact
│   └── WriteRefused    for want of descriptors or memory: the disk is as it was, and it may be tried again
├── ArchiveDamaged      a file is no archive, or not what was written
├── ArchiveUnknown      an archive of a version that this one does not read
└── ReadFailed          a stored extent did not come back; the KV must be recomputed
    ├── ExtentMissing   no such run in the tier
    ├── ExtentCorrupt   checksum, header, fingerprint or chain hash is not what was written
    ├── ReadError       the system call failed (errno in `__cause__`)
    ├── ReadTimeout     not loaded by its deadline
    └── ReadCancelled   cancelled by its owner
"""

from __future__ import annotations


class OffloadError(Exception):
    """Base of every error that leaves this package."""


class BudgetTooSmall(OffloadError):
    """A budget cannot hold what one request needs at the least."""


class MemoryRefused(OffloadError):
    """The kernel does not give the memory that a budget says."""


class FolderUnusable(OffloadError):
    """The folder of the disk tier cannot be made, locked or written."""


class FolderInUse(FolderUnusable):
    """Another daemon holds the folder."""


class IndexDamaged(OffloadError):
    """The index of the disk tier cannot be read."""


class TierFull(OffloadError):
    """A tier has no room now."""


class ReadFailed(OffloadError):
    """A stored extent did not come back: its KV must be recomputed."""


class ExtentMissing(ReadFailed):
    """There is no such run in the tier."""


class ExtentCorrupt(ReadFailed):
    """What was read is not what was written for this run."""


class ReadError(ReadFailed):
    """The read system call failed."""


class ReadTimeout(ReadFailed):
    """The extent was not loaded by its deadline."""


class ReadCancelled(ReadFailed):
    """The owner no longer wants the extent."""


class WriteFailed(OffloadError):
    """A run could not be made durable. It is absent; earlier runs are intact."""


class WriteRefused(WriteFailed):
    """The kernel lacked something that passes, such as descriptors; the disk has not failed."""


class ArchiveDamaged(OffloadError):
    """A file is no archive, ends early or is not what was written."""


class ArchiveUnknown(OffloadError):
    """An archive of a version that this program does not read."""
