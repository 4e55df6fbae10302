"""The interface of a device's memory, streams and kernels: what the pool, the arena and launches need.

Addresses and sizes are in bytes. Work is given to a stream and done later, in the order of its stream; two
streams know nothing of each other but what events say. The host may read what a copy wrote, and reuse or give
back memory that work touches, only after an event that was recorded behind that work has passed.

Every method may raise LaunchFailed, because that tells of earlier work, too.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeVar

from .tensors import Array

Image = TypeVar("Image", contravariant=True)
"""What a device loads kernels from."""


class Stream(enum.Enum):
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
        """Work given to the stream from now on begins after this event. Never blocks."""

    def passed(self) -> bool:
        """Whether it has passed; never blocks."""

    def synchronise(self) -> None:
        """Block until it has passed."""


class Kernel(Protocol):
    def launch(self, stream: Stream, grid: tuple[int, int, int], *arguments: int | float) -> None:
        """Run it over a grid: addresses and integers as int, float32 as float.

        Raises TypeError if these are not the arguments that it takes.
        """


class Device(Protocol[Image]):
    @property
    def name(self) -> str: ...

    @property
    def page_bytes(self) -> int:
        """What `reserve` and `map` take multiples of."""

    def load(self, image: Image, name: str, *, threads: int = 32, shared_bytes: int = 0) -> Kernel:
        """A kernel whose blocks have so many threads and so much dynamic shared memory.

        Raises KeyError if the image has none of that name, ValueError if a block cannot be like that.
        """

    def allocate(self, nbytes: int) -> int:
        """The address of new memory, a multiple of 256; it holds anything. Raises OutOfMemory."""

    def free(self, address: int) -> None:
        """Give back what `allocate` returned. Nothing pending may touch it."""

    def register(self, address: int, nbytes: int) -> None:
        """Pin host memory, so that copies reach it.

        address and nbytes: multiples of 4096. Raises RegistrationRefused; none of it is pinned then.
        """

    def unregister(self, address: int) -> None:
        """End what `register` did. Nothing pending may touch it."""

    def copy(self, stream: Stream, copies: Sequence[Copy]) -> None:
        """Give a batch to the stream; the copies of one batch happen in any order.

        Raises OutOfMemory; none of them happens then.
        """

    def compute(self, stream: Stream, work: Callable[..., object], *arrays: Array) -> None:
        """Give torch's operations to the stream: `work` takes tensors that are these arrays, and may neither
        wait for the device nor touch other memory of it.

        Raises OutOfMemory, also if torch finds none; some of the operations may happen then.
        """

    def record(self, stream: Stream) -> DeviceEvent:
        """An event behind all that was given to the stream. Raises OutOfMemory."""

    def reserve(self, nbytes: int) -> int:
        """The address of a range that nothing backs. Raises OutOfMemory if there are no such addresses."""

    def release(self, address: int) -> None:
        """Give back a reserved range, of which nothing is mapped."""

    def map(self, address: int, nbytes: int) -> None:
        """Back a part of a reserved range by memory, which holds anything.

        Raises OutOfMemory; nothing is mapped then.
        """

    def unmap(self, address: int, nbytes: int) -> None:
        """Give back the memory of exactly what one call of `map` backed. Nothing pending may touch it."""

    def close(self) -> None:
        """Wait for all work, then give back everything; never raises DeviceError."""
