"""While a scan of the KV on disk decodes, how much of its reading is hidden behind computing?

SmolLM2-135M in bfloat16, format k8v4, in two cases.

Long: 65,536 tokens, 90 % of their KV on disk, in full runs, in an engine without its daemon. K and V are
what lies in memory, for the prompt is not computed; positions go far beyond what the model was trained for.
The baseline has everything in host memory. Each a process of its own, in turns, medians of 3, each of these
the median of some steps.

Short: 7,500 tokens with the demo's budgets, in a daemon: one window on the device, 25 % of the KV in host
memory, which leaves room for short runs only, and the rest on disk. The baseline is a second daemon with
everything in host memory. Each prefills once; then both continue their context by 32 tokens in turns,
medians of 3. Times are the client's.

All that is on disk is read again for every token. Bytes and stalls are the prefetcher's own counters.

- decode: milliseconds a token.
- read rate: bytes read / seconds of decoding, and rate of one read: bytes / seconds within reads, which sum
  over the reader threads and hold the check of the extent's checksum too.
- read time hidden: 1 - seconds that attention waited / seconds that as many reads of the same size, by as
  many threads, take on this disk with nothing else to do. Below 0, reading slows down beside computing.

What bounds the result: the disk's O_DIRECT rate over a file that was read before, the best of 1, 2 and 4
threads, measured in turns with the scans; a token takes at least as long as its reads at that rate, or its
computing.
Where reading alone takes longer than computing, no more than computing / reading can be hidden.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from bench_kernels import layout, model, records
from harness import Goal, Result, disk_rates, document, in_our_child, main, medians, say
from steps import Steps, blocks_of

from spilld import Client
from spilld.assembly import READERS, build_store, use_threads
from spilld.config.config import Config
from spilld.demo.demo import MODEL, budgets
from spilld.demo.spawn import spawned
from spilld.models.catalog import default_cache, resolve
from spilld.monitoring.metrics import Metrics
from spilld.offload.host import residency
from spilld.offload.record import Element, Format
from spilld.offload.store.store import Store

BENCH = "scan"
LONG = 65536
IN_HOST = 0.1
SPARE = 64
CALLS = 9
TOKENS = 7500
WARM_UP = 4
COUNT = 32
OF_THE_RATE = 0.85
"""What a scan is to reach of the disk's rate, or of that of computing."""


def long_scan(on_disk: bool) -> dict[str, float]:
    """Of steps at LONG tokens: milliseconds of each, and what was read per token."""
    use_threads(None)
    found = model()
    tokens = LONG + SPARE
    whole = len(found.geometry.layers) * blocks_of(tokens) * layout(Format.K8V4).record_bytes
    with tempfile.TemporaryDirectory(prefix="spilld-bench-") as folder:
        config = Config(
            format="k8v4",
            dtype="bfloat16",
            host_budget=int(IN_HOST * whole) if on_disk else whole,
            disk_budget=2 * whole if on_disk else 0,
            state=Path(folder),
        )
        store = build_store(config, found, residency.plan, Metrics())
        try:
            store.records(0)[:] = records(Format.K8V4, 1)
            steps = Steps(found, store, tokens, 1)
            steps.feed([1] * tokens)
            steps.skip(LONG)
            say(f"{LONG} tokens: the KV lies in {steps.usage}")
            return _counted(steps, store)
        finally:
            store.close()


def long_scans() -> dict[str, dict[str, float]]:
    """Of engines at LONG tokens, by where the KV lies."""
    scans = {case: partial(in_our_child, long_scan, case == "disk") for case in ("disk", "host")}
    return medians({**scans, "alone": best_rate})


def _counted(steps: Steps, store: Store) -> dict[str, float]:
    for _ in range(WARM_UP):
        steps.step(1, range(1))
    before, times = store.stats(), []
    for _ in range(CALLS):
        began = time.perf_counter()
        steps.step(1, range(1))
        times.append(time.perf_counter() - began)
    after = store.stats()
    used = {name: _number(after, name) - _number(before, name) for name in COUNTERS} if store.disk else {}
    return {
        "decode_ms": 1e3 * statistics.median(times),
        **{name: count / CALLS for name, count in used.items()},
    }


class Scan:
    """A daemon that holds a context of TOKENS tokens."""

    def __init__(self, client: Client, prompt: list[int]) -> None:
        self._client = client
        stream = client.generate(prompt, keep=True, max_tokens=WARM_UP, ignore_eos=True)
        stream.text()
        self._context = stream.result.context
        say(f"the KV lies in {stream.result.usage.kv_bytes}")

    def decode(self) -> dict[str, float]:
        """Continue the context by COUNT tokens: milliseconds of each, and what was read per token."""
        before = self._counters()
        began = time.perf_counter()
        stream = self._client.generate([], context=self._context, max_tokens=COUNT, ignore_eos=True)
        stream.text()
        seconds = time.perf_counter() - began
        used = {name: count - before[name] for name, count in self._counters().items()}
        if stream.result.usage.generated_tokens != COUNT:
            raise RuntimeError(f"not {COUNT} tokens: {stream.result.usage}")
        return {"decode_ms": 1e3 * seconds / COUNT, **{name: count / COUNT for name, count in used.items()}}

    def _counters(self) -> dict[str, float]:
        stats = self._client.stats()
        return {name: _number(stats, name) for name in COUNTERS}


COUNTERS = ("reads", "bytes_read", "read_seconds", "stall_seconds")


def _number(stats: Mapping[str, object], name: str) -> float:
    value = stats[f"prefetch_{name}"]
    assert isinstance(value, int | float), name
    return value


def short_scans() -> dict[str, dict[str, float]]:
    """Of daemons at TOKENS tokens, by where the KV lies."""
    folder = resolve(MODEL, default_cache(), Element.BFLOAT16)
    prompt = document(folder, TOKENS)
    settings = {
        "disk": budgets(folder, TOKENS, Format.K8V4, Element.BFLOAT16),
        "host": {"model": MODEL, "format": "k8v4", "dtype": "bfloat16"},
    }
    with ExitStack() as stack:
        scans = {}
        for case, options in settings.items():
            say(f"prefill: {case}")
            daemon = stack.enter_context(spawned(options))
            scans[case] = Scan(stack.enter_context(Client(daemon.address)), prompt)
        return medians({**{case: scan.decode for case, scan in scans.items()}, "alone": best_rate})


def best_rate() -> dict[str, float]:
    """Of the disk, bytes/s, with nothing else to do."""
    return {"bytes_s": max(disk_rates().values())}


def measure() -> tuple[dict[str, float], list[Result]]:
    found = {LONG: long_scans(), TOKENS: short_scans()}
    limits, lines = {}, []
    for tokens, times in found.items():
        disk, best = times["disk"], times["alone"]["bytes_s"]
        extent = round(disk["bytes_read"] / disk["reads"] / 4096) * 4096
        alone = disk_rates([READERS], extent)[READERS]
        limits[f"{tokens} tokens: disk_bytes_s"] = best
        limits[f"{tokens} tokens: disk_bytes_s, {READERS} threads, {extent} bytes"] = alone
        lines += results(tokens, disk, times["host"]["decode_ms"], best, alone)
    return limits, lines


def results(
    tokens: int, disk: Mapping[str, float], host_ms: float, best: float, alone: float
) -> list[Result]:
    """disk: medians per token; best, alone: bytes/s of the disk in long reads, and in reads like its own."""
    read_ms = 1e3 * disk["bytes_read"] / alone
    least_ms = max(host_ms, 1e3 * disk["bytes_read"] / best)
    kib = disk["bytes_read"] / disk["reads"] / 1024
    case = f"{tokens} tokens, {disk['bytes_read'] / 1e6:.0f} MB a token by {kib:.0f} KiB"
    result = partial(Result, bench=BENCH, case=case)
    return [
        result(
            metric="decode",
            unit="ms/token",
            ours=disk["decode_ms"],
            baseline=host_ms,
            limit=least_ms,
            goal=Goal("ours", least_ms / OF_THE_RATE),
        ),
        result(
            metric="read rate",
            unit="MB/s",
            ours=disk["bytes_read"] / disk["decode_ms"] / 1e3,
            limit=best / 1e6,
        ),
        result(
            metric="rate of one read",
            unit="MB/s",
            ours=disk["bytes_read"] / disk["read_seconds"] / 1e6,
            limit=alone / READERS / 1e6,
        ),
        result(
            metric="read time hidden",
            unit="share",
            ours=1 - 1e3 * disk["stall_seconds"] / read_ms,
            limit=min(1.0, host_ms / read_ms),
        ),
    ]


if __name__ == "__main__":
    main(__doc__, measure)
