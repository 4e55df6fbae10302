"""Memory that the kernel still has for this process; taking more ends in the process being killed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

log = logging.getLogger(__name__)

LIMITS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Files of a control group, of version 2 and 1: its limit, its use, and the reclaimable part of that."""


def available_bytes(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the bytes that can be taken before the machine or a control group of ours has nothing left.

    Returns:
        None where the kernel does not say.
    """
    free = [
        *_of_the_machine(proc / "meminfo"),
        *(left for group in _groups(proc, groups) for left in _of(group)),
    ]
    return min(free, default=None)


def physical_bytes(proc: Path = Path("/proc")) -> int | None:
    """Return the memory of the machine in bytes; None where the kernel does not say."""
    total = _fields(proc / "meminfo").get("MemTotal:")
    return None if total is None else total * 1024


def _of_the_machine(meminfo: Path) -> Iterator[int]:
    fields = _fields(meminfo)
    if "MemAvailable:" in fields:
        yield fields["MemAvailable:"] * 1024


def _groups(proc: Path, groups: Path) -> Iterator[Path]:
    """Yield the folders of our groups that may limit memory, and those above them."""
    for line in _text(proc / "self" / "cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        root = groups if number == "0" else groups / "memory"
        if number == "0" or "memory" in controllers.split(","):
            group = root / path.lstrip("/")
            yield group
            yield from (parent for parent in group.parents if parent.is_relative_to(root))


def _of(group: Path) -> Iterator[int]:
    for most, used, reclaimable in LIMITS:
        limit, use = _text(group / most).strip(), _text(group / used).strip()
        if limit.isdigit() and use.isdigit():
            yield max(0, int(limit) - int(use) + _fields(group / "memory.stat").get(reclaimable, 0))


def _fields(file: Path) -> dict[str, int]:
    """Return the numbers of lines that begin with a name and a number, by name."""
    lines = (line.split() for line in _text(file).splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


class MemoryWatch:
    """Tells whether less memory than a floor is left.

    Attributes:
        short: Whether it was when `look` was called last.
    """

    def __init__(self, floor_bytes: int, available: Callable[[], int | None] = available_bytes) -> None:
        self._floor = floor_bytes
        self._available = available
        self.short = False

    def look(self) -> None:
        """Ask the kernel again."""
        left = self._available()
        short = left is not None and left < self._floor
        if short and not self.short:
            log.warning("%s bytes of memory are left, fewer than memory_floor: giving some back", left)
        elif self.short and not short:
            log.info("memory is no longer short: %s bytes are left", left)
        self.short = short
