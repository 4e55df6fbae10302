"""The interface of a device's memory, streams and kernels, for the record pool, the arena and launches.

Addresses and sizes are in bytes. Work is given to a stream and done later, in the order of its stream; two
streams are ordered by events only. The host may read what a copy wrote, and reuse or give back memory that
work touches, only after an event that was recorded behind that work has passed.

Every method may raise LaunchFailed, because it may report a failure of earlier work.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeVar

from .tensors import Array

Image = TypeVar("Image", contravariant=True)
"""What a device loads kernels from."""


class Stream(enum.Enum):
    """A queue of work for a device, done in order."""

    COMPUTE = "compute"
    COPY_IN = "copy-in"
    COPY_OUT = "copy-out"


class Copy(NamedTuple):
    """Bytes from one address to another; each is device memory or registered host memory."""

    to: int
    source: int
    nbytes: int


class DeviceEvent(Protocol):
    """A point in a stream, passed when all work that was given to the stream before is done."""

    def before(self, stream: Stream) -> None:
        """Let work that the stream is given from now on begin after this event; never blocks."""

    def passed(self) -> bool:
        """Return whether it has passed; never blocks."""

    def synchronise(self) -> None:
        """Block until it has passed."""


class Kernel(Protocol):
    """A kernel that is loaded on a device."""

    def launch(self, stream: Stream, grid: tuple[int, int, int], *arguments: int | float) -> None:
        """Run it over a grid.

        Args:
            stream: The stream that the work is given to.
            grid: Blocks in x, y and z.
            arguments: Addresses and integers as int, float32 as float.

        Raises:
            TypeError: These are not the arguments that the kernel takes.
        """


class Device(Protocol[Image]):
    """A device that KV windows, records and kernels live on."""

    @property
    def name(self) -> str:
        """What the device is called."""

    @property
    def page_bytes(self) -> int:
        """Size of a page: `reserve` and `map` take multiples of it."""

    def load(self, image: Image, name: str, *, threads: int = 32, shared_bytes: int = 0) -> Kernel:
        """Load a kernel.

        Args:
            image: What it is loaded from.
            name: The kernel's name in the image.
            threads: Threads of each block.
            shared_bytes: Dynamic shared memory of each block.

        Raises:
            KeyError: The image has no kernel of that name.
            ValueError: A block cannot be like that.
        """

    def allocate(self, nbytes: int) -> int:
        """Return the address of new, uninitialised memory, a multiple of 256.

        Raises:
            OutOfMemory: There is not enough memory.
        """

    def free(self, address: int) -> None:
        """Give back what `allocate` returned. No pending work may touch it."""

    def register(self, address: int, nbytes: int) -> None:
        """Pin host memory, so that copies reach it.

        Args:
            address: A multiple of 4096.
            nbytes: A multiple of 4096.

        Raises:
            RegistrationRefused: None of it is pinned then.
        """

    def unregister(self, address: int) -> None:
        """Unpin what `register` pinned. No pending work may touch it."""

    def copy(self, stream: Stream, copies: Sequence[Copy]) -> None:
        """Give a batch of copies to the stream; those of one batch happen in any order.

        Raises:
            OutOfMemory: None of them happens then.
        """

    def compute(self, stream: Stream, work: Callable[..., object], *arrays: Array) -> None:
        """Give torch's operations to the stream.

        Args:
            stream: The stream that the work is given to.
            work: Takes tensors that are views of the arrays. It may neither wait for the device nor touch
                other memory of it.
            arrays: What the work reads and writes.

        Raises:
            OutOfMemory: The device or torch has no memory left; some of the operations may happen then.
        """

    def record(self, stream: Stream) -> DeviceEvent:
        """Return an event behind all that was given to the stream.

        Raises:
            OutOfMemory: No event could be made.
        """

    def reserve(self, nbytes: int) -> int:
        """Return the address of a range that is not backed by memory.

        Raises:
            OutOfMemory: No such range of addresses is free.
        """

    def release(self, address: int) -> None:
        """Give back a reserved range, of which nothing is mapped."""

    def map(self, address: int, nbytes: int) -> None:
        """Back a part of a reserved range by uninitialised memory.

        Raises:
            OutOfMemory: Nothing is mapped then.
        """

    def unmap(self, address: int, nbytes: int) -> None:
        """Give back the memory of exactly what one call of `map` backed. No pending work may touch it."""

    def close(self) -> None:
        """Wait for all work, then give back everything; never raises DeviceError."""
