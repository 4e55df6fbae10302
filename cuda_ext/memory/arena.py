"""KV windows in device memory: one address range for all of them, backed by memory where one is taken.

The idea is that of vAttention (Prabhu et al., 2024): a kernel sees contiguous addresses, so that stock
attention runs over them, while the memory behind them changes with use.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

from spilld.cuda_ext.device.base import Device, DeviceEvent, Stream
from spilld.cuda_ext.errors import OutOfMemory

from .fences import Fences


class ArenaFull(Exception):
    """No window is free, or the budget backs no more of them."""


class Arena:
    """A fixed number of windows of window_bytes, side by side.

    Pages between two neighbours are shared; a window of whole pages is mapped as one. Pages stay mapped when
    their windows are given back, for the next one, until `trim` is called. Owned by one thread.
    """

    def __init__(self, device: Device[Any], window_bytes: int, windows: int, budget_bytes: int) -> None:
        """Reserve the addresses.

        Raises:
            ValueError: The budget backs not even one window.
            OutOfMemory: No such range of addresses is free.
        """
        self.window_bytes, self.windows, self.budget_bytes = window_bytes, windows, budget_bytes
        self._device = device
        self._page = device.page_bytes if window_bytes % device.page_bytes else max(1, window_bytes)
        self._taken: set[int] = set()
        self._mapped: set[int] = set()
        self._fences = Fences(device)
        least = min(len(self._pages(window)) for window in range(windows)) * self._page if windows > 0 else 1
        if window_bytes < 1 or least > budget_bytes or windows < 1:
            raise ValueError(f"a budget of {budget_bytes} bytes backs no window of {window_bytes} bytes")
        self.base = device.reserve(len(self._span(0, windows * window_bytes)) * self._page)

    @property
    def taken(self) -> int:
        """Number of windows that are taken."""
        return len(self._taken)

    @property
    def mapped_bytes(self) -> int:
        """Device memory behind windows, taken or given back."""
        return len(self._mapped) * self._page

    def address(self, window: int) -> int:
        """Return the address of a window."""
        return self.base + window * self.window_bytes

    def take(self) -> int:
        """Return a window that is now the caller's, uninitialised.

        Raises:
            ArenaFull: No window is free, or the budget backs no more of them.
            OutOfMemory: The device has no memory for it.
        """
        free = [window for window in range(self.windows) if window not in self._taken]
        if not free:
            raise ArenaFull(f"all {self.windows} windows are taken")
        # Mapped pages that back no taken window back a whole free window: min() finds that one first.
        window = min(free, key=lambda window: len(self._missing(window)))
        if self.mapped_bytes + len(self._missing(window)) * self._page > self.budget_bytes:
            raise ArenaFull(f"the budget of {self.budget_bytes} bytes backs no more windows")
        self._back(window)
        self._taken.add(window)
        return window

    def give_back(self, window: int) -> None:
        """Give a window back; pending work may still use it.

        Raises:
            ValueError: It is not taken, or a scope of `use` is open on it.
        """
        if window not in self._taken or self._fences.open(window):
            raise ValueError(f"window {window} is not taken, or is given back within its use")
        self._taken.remove(window)

    def use(
        self, stream: Stream, *, reads: Iterable[int] = (), writes: Iterable[int] = ()
    ) -> AbstractContextManager[DeviceEvent]:
        """Return a scope for work on windows, which gives the event behind that work.

        Args:
            stream: The stream that the work in the scope is given to.
            reads: Windows that the work reads.
            writes: Windows that it writes.

        Raises:
            OutOfMemory: Before the scope is entered.
            ValueError: A window is not taken.
        """
        reads, writes = tuple(reads), tuple(writes)
        if not self._taken.issuperset((*reads, *writes)):
            raise ValueError("a window is not taken")
        return self._fences.use(stream, reads=reads, writes=writes)

    def trim(self) -> None:
        """Unmap pages behind no window that is taken or in use; never blocks.

        Raises:
            OutOfMemory: An event could not be recorded.
        """
        used = {window for window in range(self.windows) if not self._fences.settled([window])}
        for page in self._mapped.difference(*map(self._pages, self._taken | used)):
            self._release(page)

    def close(self) -> None:
        """Wait for all work on windows and give back everything; after OutOfMemory it may be called again."""
        if self.base:
            self._taken.clear()
            self._fences.settle(range(self.windows))
            for page in list(self._mapped):
                self._release(page)
            self._device.release(self.base)
            self.base = 0

    def check_integrity(self) -> None:
        """Raise AssertionError if the bookkeeping is inconsistent."""
        whole = [window for window in range(self.windows) if not self._missing(window)]
        assert self._taken.issubset(whole), "a taken window is not backed"
        assert not self._mapped.difference(*map(self._pages, whole)), (
            "a page backs no window that is backed as a whole"
        )
        assert self.mapped_bytes <= self.budget_bytes, "more is mapped than the budget allows"

    def _back(self, window: int) -> None:
        """Map the missing pages of a window. On an error nothing is mapped that was not before."""
        new: list[int] = []
        try:
            for page in self._missing(window):
                self._device.map(self.base + page * self._page, self._page)
                new.append(page)
                self._mapped.add(page)
        except OutOfMemory:
            for page in new:
                self._release(page)
            raise

    def _release(self, page: int) -> None:
        self._device.unmap(self.base + page * self._page, self._page)
        self._mapped.remove(page)

    def _pages(self, window: int) -> range:
        return self._span(window * self.window_bytes, self.window_bytes)

    def _span(self, start: int, nbytes: int) -> range:
        return range(start // self._page, -(-(start + nbytes) // self._page))

    def _missing(self, window: int) -> list[int]:
        return [page for page in self._pages(window) if page not in self._mapped]
