"""Checks that pass once: a note in the cache saves them at later starts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import torch
import transformers

_passed: set[Path] = set()
"""Names of the notes of this process, which loads models with several caches."""


def pass_once(
    kind: str, cache: Path, known: object, code: Iterable[str], check: Callable[[], object]
) -> None:
    """Run a check, unless it has passed before for the same things known and the same code.

    Args:
        kind: The folder of its notes in the cache.
        cache: The cache folder. Where it cannot be written the check runs again.
        known: What the check depends on; its repr says all of it. Versions of torch and transformers are
            added.
        code: Files of the code that the check depends on.
        check: Raises if it does not pass.
    """
    hasher = hashlib.blake2b(
        repr((known, torch.__version__, transformers.__version__)).encode(), digest_size=16
    )
    for file in code:
        hasher.update(Path(file).read_bytes())
    name = Path(kind) / hasher.hexdigest()
    note = cache / name
    if name in _passed or note.exists():
        return
    check()
    _passed.add(name)
    with suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()
