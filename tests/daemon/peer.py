"""What tests at the daemon's socket share."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Self

import zmq

from spilld.protocol.messages import Reply, Request
from spilld.protocol.wire import decode, encode


class Peer:
    """A client without manners: a plain DEALER socket."""

    def __init__(self, address: str, **options: int | bytes) -> None:
        """options: of zmq, by their names."""
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        for name, value in options.items():
            self.socket.setsockopt(getattr(zmq, name), value)
        self.socket.connect(address)

    def send(self, *frames: bytes) -> None:
        self.socket.send_multipart(frames)

    def say(self, *requests: Request) -> None:
        for request in requests:
            self.send(*encode(request))

    def reply(self, patience_ms: int = 5000) -> Reply:
        assert self.socket.poll(patience_ms), "no reply"
        reply = decode(self.socket.recv_multipart())
        assert isinstance(reply, Reply)
        return reply

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


def until(condition: Callable[[], object], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.002)
