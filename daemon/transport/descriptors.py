"""How many files and connections this process may have open."""

from __future__ import annotations

import logging
import resource

log = logging.getLogger(__name__)

RESERVED = 256
"""Descriptors that connections leave to files and what else the daemon opens."""


def raise_limit() -> None:
    """Raise the soft limit of open files to the hard one: it (often 1024) is for users of select(2)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:
        log.warning("the limit of open files stays %d, not %d: %s", soft, hard, error)


def connections(wanted: int) -> int:
    """Return how many connections there may be: as many as wanted, or as descriptors allow.

    RESERVED descriptors, or half of them if that is fewer, are left to the rest of the daemon.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return wanted
    most = max(limit - RESERVED, limit // 2)
    if most < wanted:
        log.warning("at most %d clients can be connected: this process may open %d files", most, limit)
    return min(most, wanted)
