"""Transformers with a bfloat16 folder and its own cache: python -m systems.transformers FOLDER THREADS"""

from __future__ import annotations

import sys
import time

import torch
import transformers

from .serving import Generate, serve


def load(folder: str, threads: int) -> tuple[dict[str, str], Generate]:
    """A model whose cache grows as it must."""
    torch.set_num_threads(threads)
    module = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, local_files_only=True
    ).eval()

    def generate(prompt: list[int], count: int) -> list[float]:
        arrivals: list[float] = []
        cache, tokens = None, torch.tensor([prompt])
        asked = time.perf_counter()
        with torch.inference_mode():
            while len(arrivals) < count:
                result = module(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache, tokens = result.past_key_values, result.logits[:, -1].argmax(-1, keepdim=True)
                arrivals.append(time.perf_counter() - asked)
        return arrivals

    return {"transformers": transformers.__version__, "its torch": torch.__version__}, generate


if __name__ == "__main__":
    serve(lambda: load(sys.argv[1], int(sys.argv[2])))
