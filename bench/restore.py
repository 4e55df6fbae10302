"""How long does a session that lies on disk take to go on, against computing it again?

SmolLM2-135M in bfloat16, format k8v4, a session of 7,500 tokens (Python's documentation). One daemon computes
it, answers once more with everything still in host memory, and ends. A second daemon on the same folder,
asked for something else first so that its kernels are loaded, goes on with the session: its KV is read with
O_DIRECT, past the page cache. What is timed, at the client, is until the first token of the same short
question arrives. Medians of 3 pairs of daemons, each pair in an empty folder.

- against computing it again: the baseline is the prefill of the first daemon.
- against what bounds it: the larger of reading the session's bytes at the disk's measured rate (of a file
  that was read before) and the same question with all KV in host memory.

Write-behind is measured too: milliseconds a token of a decode of 128 tokens right after a prefill of 4,000,
whose KV is being written meanwhile, against the same with the disk tier off.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping

from harness import Goal, Result, disk_rates, document, main, medians, say

from spilld import Client, Done, Token
from spilld.demo.demo import MODEL, Shape
from spilld.demo.spawn import spawned
from spilld.models.catalog import default_cache, resolve
from spilld.offload.record import Element, Format

BENCH = "restore"
TOKENS = 7500
QUESTION = "\nIn short,"
WARM_UP = 600
CASE = f"{TOKENS} tokens"


def ask(client: Client, prompt: str | list[int], session: str | None, count: int = 1) -> tuple[float, Done]:
    """Seconds until the first token, and how it ended."""
    asked = time.perf_counter()
    stream = client.generate(prompt, session=session, max_tokens=count, ignore_eos=True)
    first = next(time.perf_counter() for event in stream if isinstance(event, Token))
    for _ in stream:
        continue
    return first - asked, stream.result


def once(prompt: list[int]) -> dict[str, float]:
    """One session in an empty folder, across a restart."""
    with tempfile.TemporaryDirectory(prefix="spilld-bench-") as folder:
        settings = {"model": MODEL, "format": "k8v4", "dtype": "bfloat16", "state": folder}
        with spawned(settings) as daemon, Client(daemon.address) as client:
            ask(client, prompt[:WARM_UP], None, count=4)
            prefill, _ = ask(client, prompt, "book")
            host, _ = ask(client, QUESTION, "book")
        with spawned(settings) as daemon, Client(daemon.address) as client:
            ask(client, prompt[50 : 50 + WARM_UP], None, count=4)
            restored, done = ask(client, QUESTION, "book")
    if done.usage.cached_tokens < TOKENS:
        raise RuntimeError(f"only {done.usage.cached_tokens} tokens came back from disk")
    return {
        "prefill_s": prefill,
        "host_s": host,
        "restored_s": restored,
        "read_bytes": float(done.usage.disk_read_bytes),
    }


def decode_ms(prompt: list[int], disk_budget: str) -> dict[str, float]:
    """Milliseconds a token of the 128 after a prompt."""
    with tempfile.TemporaryDirectory(prefix="spilld-bench-") as folder:
        settings = {
            "model": MODEL,
            "format": "k8v4",
            "dtype": "bfloat16",
            "state": folder,
            "disk_budget": disk_budget,
        }
        with spawned(settings) as daemon, Client(daemon.address) as client:
            ask(client, prompt[:WARM_UP], None, count=4)
            done = ask(client, prompt[1:], None, count=129)[1]
            return {"decode_ms": done.usage.decode_ms / 128}


def measure() -> tuple[Mapping[str, float], list[Result]]:
    folder = resolve(MODEL, default_cache(), Element.BFLOAT16)
    prompt = document(folder, TOKENS)
    rates = disk_rates()
    limits = {f"disk_bytes_s_{threads}_threads": rate for threads, rate in rates.items()}
    found = medians({"restore": lambda: once(prompt)})["restore"]
    kv_bytes = Shape.of(folder).kv_bytes(TOKENS, Format.K8V4, Element.BFLOAT16)
    reading = kv_bytes / max(rates.values())
    bound = max(reading, found["host_s"])
    say(f"reading alone {reading:.3f} s, with all in host memory {found['host_s']:.3f} s")
    writing = medians(
        {
            "write-behind": lambda: decode_ms(prompt[:4000], "16GiB"),
            "no disk": lambda: decode_ms(prompt[:4000], "0"),
        }
    )
    return limits, [
        Result(
            bench=BENCH,
            metric="first token, against prefill",
            case=CASE,
            unit="s",
            ours=found["restored_s"],
            baseline=found["prefill_s"],
            limit=bound,
            goal=Goal("ratio", 1 / 60),
        ),
        Result(
            bench=BENCH,
            metric="first token, against its bound",
            case=CASE,
            unit="s",
            ours=found["restored_s"],
            baseline=bound,
            limit=bound,
            goal=Goal("ratio", 1.3),
        ),
        Result(
            bench=BENCH,
            metric="decode with write-behind",
            case="4000 tokens and 128 more",
            unit="ms/token",
            ours=writing["write-behind"]["decode_ms"],
            baseline=writing["no disk"]["decode_ms"],
            goal=Goal("ratio", 1.05),
        ),
    ]


if __name__ == "__main__":
    main(__doc__ or "", measure)
