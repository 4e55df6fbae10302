"""How long until a daemon that was started before is ready again?

SmolLM2-135M in bfloat16 with packed weights and the default settings, converted and its kernels compiled
before, so nothing is left but to import, to load and to bind. Medians of 3, each a process of its own.

- load: seconds that loading the model takes in a process that has imported everything.
- ready: seconds from starting `spilld serve` to its answer to the first message.
- import: seconds of an interpreter that imports torch, transformers and numba as the daemon does, and nothing
  else; what bounds "ready" from below, measured in the same run.
"""

from __future__ import annotations

import time
from contextlib import ExitStack

from bench_kernels import model
from harness import Goal, Result, in_child, main, medians

from spilld.demo.demo import MODEL
from spilld.demo.spawn import import_rss_bytes, spawned

BENCH = "start"
LOAD_S, READY_S = 2.0, 5.0


def timed_load() -> float:
    began = time.perf_counter()
    model()
    return time.perf_counter() - began


def ready() -> dict[str, float]:
    """Seconds by what is timed."""
    with ExitStack() as stack:
        began = time.perf_counter()
        stack.enter_context(spawned({"model": MODEL, "dtype": "bfloat16"}))
        seconds = time.perf_counter() - began
    began = time.perf_counter()
    import_rss_bytes()
    imported = time.perf_counter() - began
    return {"load": in_child(timed_load), "ready": seconds, "import": imported}


def measure() -> tuple[dict[str, float], list[Result]]:
    ready()  # converts and compiles, the first time
    found = medians({"ours": ready})["ours"]
    rows = [
        Result(
            bench=BENCH, metric="load", case=MODEL, unit="s", ours=found["load"], goal=Goal("ours", LOAD_S)
        ),
        Result(
            bench=BENCH,
            metric="ready",
            case=f"{MODEL}, not the first time",
            unit="s",
            ours=found["ready"],
            limit=found["import"],
            goal=Goal("ours", READY_S),
        ),
    ]
    return {}, rows


if __name__ == "__main__":
    main(__doc__ or "", measure)
