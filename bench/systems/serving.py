"""A system as a process: it loads a model, then answers one request a line, until its stdin ends.

    python -m systems.NAME MODEL ... < requests

stdout has one JSON object a line: first {"versions": {...}}, then for every {"prompt": [token, ...], "count":
COUNT} a {"arrivals_s": [...]}, the seconds from the request until each of its COUNT tokens was there. Instead
of any of them, {"failed": REASON} is the last line.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, TextIO

PR_SET_PDEATHSIG = 1

Generate = Callable[[Any, int], list[float]]
"""(prompt, count) to the arrivals of count greedy tokens; end-of-text does not end it."""


def serve(load: Callable[[], tuple[dict[str, str], Generate]]) -> None:
    """load: returns the versions of what answers, and what answers."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # it may be stopped when its driver dies
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what the system itself prints
    sys.stdout = sys.stderr
    try:
        _answer(load, replies)
    except Exception as error:
        print(json.dumps({"failed": f"{type(error).__name__}: {error}"}), file=replies)
        raise


def _answer(load: Callable[[], tuple[dict[str, str], Generate]], replies: TextIO) -> None:
    versions, generate = load()
    print(json.dumps({"versions": versions}), file=replies)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps({"arrivals_s": generate(request["prompt"], request["count"])}), file=replies)
