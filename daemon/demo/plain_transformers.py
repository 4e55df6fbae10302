"""The reference for comparisons: plain transformers in a process of its own.

    python -m spilld.demo.plain_transformers FOLDER DTYPE COUNT THREADS < tokens.json

prints one JSON object: the COUNT greedy tokens after the prompt (end-of-text ignored), and the times. THREADS
0 is torch's default.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Greedy:
    """Tokens, seconds of the prefill, and milliseconds of each decode step."""

    tokens: list[int]
    prefill_s: float
    decode_ms: list[float]


def greedy(folder: Path, dtype: str, prompt: Sequence[int], count: int, threads: int | None = None) -> Greedy:
    """Generate greedily in a child process.

    Args:
        folder: The model folder.
        dtype: "float32" or "bfloat16".
        prompt: Token ids.
        count: How many tokens to generate.
        threads: Of torch; None for its default.

    Raises:
        CalledProcessError: The child failed.
    """
    command = [sys.executable, "-m", __name__, str(folder), dtype, str(count), str(threads or 0)]
    child = subprocess.run(
        command, input=json.dumps(list(prompt)), capture_output=True, text=True, check=True
    )
    return Greedy(**json.loads(child.stdout.splitlines()[-1]))


def greedy_tokens(module: Any, prompt: Sequence[int]) -> Iterator[int]:
    """Yield the greedy tokens after a prompt, over transformers' own cache, without end."""
    import torch

    cache, tokens = None, torch.tensor([list(prompt)])
    while True:
        with torch.inference_mode():
            result = module(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = result.past_key_values
        tokens = result.logits[:, -1].argmax(-1, keepdim=True)
        yield int(tokens)


def _main(folder: str, dtype: str, count: str, threads: str) -> None:
    import torch
    import transformers

    if int(threads):
        torch.set_num_threads(int(threads))
    module = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), local_files_only=True
    ).eval()
    prompt = json.load(sys.stdin)
    found, arrivals = [], [time.perf_counter()]
    for token in islice(greedy_tokens(module, prompt), int(count)):
        found.append(token)
        arrivals.append(time.perf_counter())
    times = [after - before for before, after in pairwise(arrivals)]
    print(json.dumps(asdict(Greedy(found, times[0], [1e3 * t for t in times[1:]]))))


if __name__ == "__main__":
    _main(*sys.argv[1:])
