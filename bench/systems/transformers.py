"""Transformers with a bfloat16 folder and its own cache: python -m systems.transformers FOLDER THREADS"""

from __future__ import annotations

import sys
import time
from itertools import islice

import torch
import transformers

from spilld.demo.plain_transformers import greedy_tokens

from .serving import Generate, serve


def load(folder: str, threads: int) -> tuple[dict[str, str], Generate]:
    """A model whose cache grows as it must."""
    torch.set_num_threads(threads)
    module = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, local_files_only=True
    ).eval()

    def generate(prompt: list[int], count: int) -> list[float]:
        asked = time.perf_counter()
        return [time.perf_counter() - asked for _ in islice(greedy_tokens(module, prompt), count)]

    return {"transformers": transformers.__version__, "its torch": torch.__version__}, generate


if __name__ == "__main__":
    serve(lambda: load(sys.argv[1], int(sys.argv[2])))
