"""Coverage-guided fuzzing of what the daemon makes of frames: `make soak` runs it, a million times.

python -m tests.daemon.fuzz_decode CORPUS [options of libFuzzer]; a message of each type is put into CORPUS.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["spilld"]):
    from spilld.protocol.wire import decode

from .test_malformed import BODIES, FRAMES, HEADER, check_decode


def one(data: bytes) -> None:
    """A message: its last frame, or with a leading 0 both, the first of eight bytes."""
    check_decode([data[1:9], data[9:]] if data[:1] == b"\0" else [HEADER, data])


def main(arguments: list[str]) -> None:
    corpus = Path(arguments[0])
    for number, body in enumerate(BODIES):
        (corpus / f"body-{number}").write_bytes(body)
    for number, frames in enumerate(FRAMES):
        (corpus / f"frames-{number}").write_bytes(b"\0" + b"".join(frames))
    assert decode(FRAMES[0])
    atheris.Setup([sys.argv[0], *arguments], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
