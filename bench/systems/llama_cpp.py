"""llama.cpp with a GGUF file and flash attention: python -m systems.llama_cpp FILE CONTEXT THREADS KV_TYPE"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from importlib.metadata import version

import llama_cpp as library
import numpy as np

from .serving import Generate, serve

KV_TYPES = {"f16": library.GGML_TYPE_F16, "q8_0": library.GGML_TYPE_Q8_0}


def load(file: str, context: int, threads: int, kv_type: str) -> tuple[dict[str, str], Generate]:
    """A model whose cache has room for `context` tokens, more than it was trained for if need be."""
    library.llama_backend_init()
    model = library.llama_model_load_from_file(file.encode(), library.llama_model_default_params())
    vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
    params = library.llama_context_default_params()
    params.n_ctx = context
    params.n_threads = params.n_threads_batch = threads
    params.flash_attn_type = library.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.type_k = params.type_v = KV_TYPES[kv_type]
    state = library.llama_init_from_model(model, params)
    if state is None:
        raise RuntimeError(f"no context of {context} tokens with KV in {kv_type}")

    def forward(tokens: Sequence[int]) -> int:
        """The likeliest token after what came before and these."""
        array = (library.llama_token * len(tokens))(*tokens)
        if failure := library.llama_decode(state, library.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError(f"llama_decode returned {failure}")
        logits = np.ctypeslib.as_array(library.llama_get_logits_ith(state, -1), shape=(vocabulary,))
        return int(logits.argmax())

    def generate(prompt: list[int], count: int) -> list[float]:
        library.llama_memory_clear(library.llama_get_memory(state), True)
        arrivals = []
        asked = time.perf_counter()
        for start in range(0, len(prompt), params.n_batch):
            token = forward(prompt[start : start + params.n_batch])
        arrivals.append(time.perf_counter() - asked)
        while len(arrivals) < count:
            token = forward([token])
            arrivals.append(time.perf_counter() - asked)
        return arrivals

    built = library.llama_print_system_info().decode().strip()
    return {"llama-cpp-python": version("llama-cpp-python"), "llama.cpp": built}, generate


if __name__ == "__main__":
    serve(lambda: load(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]))
