"""While a scan of the KV on disk decodes, how much of its reading is hidden behind computing?

SmolLM2-135M in bfloat16, format k8v4, 7,500 tokens with the demo's budgets: one window on the device, 25 % of
the KV in host memory, the rest on disk, all of it read again for every token. The baseline is a second daemon
with everything in host memory. Each prefills once; then both continue their context by 32 tokens in turns,
medians of 3. Times are the client's, bytes and stalls the daemon's own counters around each continuation.

- decode: milliseconds a token.
- read rate: bytes read / seconds of decoding, and rate of one read: bytes / seconds within reads, which sum
  over the reader threads and hold the check of the extent's checksum too.
- read time hidden: 1 - seconds that attention waited / seconds that as many reads of the same size, by as
  many threads, take on this disk with nothing else to do. Below 0, reading slows down beside computing.

What bounds the result: the disk's O_DIRECT rate over a file that was read before, with 1, 2 and 4 threads,
measured in the same run; a token takes at least as long as its reads at the best rate, or its computing.
Where reading alone takes longer than computing, no more than computing / reading can be hidden.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial

from harness import Goal, Result, disk_rates, document, main, medians, say

from spilld.daemon.assembly import READERS
from spilld.daemon.catalog import default_cache, resolve
from spilld.daemon.client import Client
from spilld.daemon.demo import MODEL, budgets
from spilld.daemon.spawn import spawned
from spilld.offload.record import Element, Format

BENCH = "scan"
TOKENS = 7500
WARM_UP = 4
COUNT = 32
OF_THE_RATE = 0.85
"""What a scan is to reach of the disk's rate, or of that of computing."""


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
        return {name: _number(stats, f"prefetch_{name}") for name in COUNTERS}


COUNTERS = ("reads", "bytes_read", "read_seconds", "stall_seconds")


def _number(stats: Mapping[str, object], name: str) -> float:
    value = stats[name]
    assert isinstance(value, int | float), name
    return value


def measure() -> tuple[dict[str, float], list[Result]]:
    folder = resolve(MODEL, default_cache(), Element.BFLOAT16)
    prompt = document(folder, TOKENS)
    settings = {
        "disk": budgets(folder, TOKENS, Format.K8V4, Element.BFLOAT16),
        "host": {"model": MODEL, "format": "k8v4", "dtype": "bfloat16"},
    }
    rates = disk_rates()
    with ExitStack() as stack:
        scans = {}
        for case, options in settings.items():
            say(f"prefill: {case}")
            daemon = stack.enter_context(spawned(options))
            scans[case] = Scan(stack.enter_context(Client(daemon.address)), prompt)
        found = medians({case: scan.decode for case, scan in scans.items()})
    extent = round(found["disk"]["bytes_read"] / found["disk"]["reads"] / 4096) * 4096
    alone = disk_rates([READERS], extent)[READERS]
    limits = {f"disk_bytes_s_{count}_threads": rate for count, rate in rates.items()}
    limits[f"disk_bytes_s_{READERS}_threads_{extent}_bytes"] = alone
    return limits, results(found["disk"], found["host"]["decode_ms"], max(rates.values()), alone)


def results(disk: Mapping[str, float], host_ms: float, best: float, alone: float) -> list[Result]:
    """disk: medians per token; best, alone: bytes/s of the disk in long reads, and in reads like its own."""
    read_ms = 1e3 * disk["bytes_read"] / alone
    least_ms = max(host_ms, 1e3 * disk["bytes_read"] / best)
    result = partial(Result, bench=BENCH, case=f"{TOKENS} tokens, {disk['bytes_read'] / 1e6:.0f} MB a token")
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
