"""System calls that do what a script says: fail, come up short, or stall."""

from __future__ import annotations

import errno
import os
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from spilld.offload.system import PAGE, SystemCalls


@dataclass(frozen=True)
class Short:
    """Transfer only so many bytes."""

    nbytes: int


@dataclass(frozen=True)
class Stall:
    """Return only after `over` is set; `begun` tells that the call was made."""

    begun: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)


Fault = Exception | Short | Stall | None


def error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


class ScriptedSystem(SystemCalls):
    """Real system calls. script[name] holds one entry for each coming call; None, or none, lets it pass."""

    def __init__(self, *, direct: bool = True, durable: bool = False) -> None:
        self.direct = direct
        self.durable = durable
        self.script: dict[str, deque[Fault]] = defaultdict(deque)
        self.calls: Counter[str] = Counter()

    def open(self, path: Path, flags: int) -> int:
        self._meet("open")
        if flags & os.O_DIRECT and not self.direct:
            raise error(errno.EINVAL)
        return super().open(path, flags)

    def preadv(self, file: int, buffers: Sequence[memoryview], offset: int) -> int:
        short = self._meet("preadv")
        count = super().preadv(file, buffers, offset)
        if short is not None and short.nbytes < count:
            buffers[0][short.nbytes :] = bytes(len(buffers[0]) - short.nbytes)
            return short.nbytes
        return count

    def pwritev(self, file: int, buffers: Sequence[memoryview], offset: int) -> int:
        short = self._meet("pwritev")
        if short is None:
            return super().pwritev(file, buffers, offset)
        pages = short.nbytes // PAGE * PAGE
        if pages:
            super().pwritev(file, [buffers[0][:pages]], offset)
        return short.nbytes

    def fdatasync(self, file: int) -> None:
        self._meet("fdatasync")
        if self.durable:
            super().fdatasync(file)

    def fsync_folder(self, folder: Path) -> None:
        self._meet("fsync_folder")
        if self.durable:
            super().fsync_folder(folder)

    def ftruncate(self, file: int, nbytes: int) -> None:
        self._meet("ftruncate")
        super().ftruncate(file, nbytes)

    def unlink(self, path: Path) -> None:
        self._meet("unlink")
        super().unlink(path)

    def _meet(self, name: str) -> Short | None:
        self.calls[name] += 1
        script = self.script[name]
        fault = script.popleft() if script else None
        if isinstance(fault, Exception):
            raise fault
        if isinstance(fault, Stall):
            fault.begun.set()
            assert fault.over.wait(30), "the test never ended the stall"
            return None
        return fault
