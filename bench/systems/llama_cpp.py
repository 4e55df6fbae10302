"""llama.cpp with a GGUF file and flash attention.

python -m systems.llama_cpp FILE CONTEXT THREADS KV_TYPE [MOST]: of a longer prompt than MOST tokens as many
are computed, and the rest of the cache holds their K and V again.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version

import llama_cpp as library
import numpy as np

from .llama_state import repeated
from .serving import Generate, serve

KV_TYPES = {"f16": library.GGML_TYPE_F16, "q8_0": library.GGML_TYPE_Q8_0}


def load(file: str, context: int, threads: int, kv_type: str, most: int) -> tuple[dict[str, str], Generate]:
    """A model whose cache has room for `context` tokens, more than it was trained for if need be.

    most: tokens of a prompt that are computed.
    """
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

    def get_state() -> bytes:
        buffer = (ctypes.c_uint8 * library.llama_state_seq_get_size(state, 0))()
        library.llama_state_seq_get_data(state, buffer, len(buffer), 0)
        return bytes(buffer)

    def set_state(content: bytes) -> None:
        library.llama_memory_clear(library.llama_get_memory(state), True)
        buffer = (ctypes.c_uint8 * len(content)).from_buffer_copy(content)
        if not library.llama_state_seq_set_data(state, buffer, len(content), 0):
            raise RuntimeError("the repeated state was not taken")

    def generate(prompt: list[int], count: int) -> list[float]:
        library.llama_memory_clear(library.llama_get_memory(state), True)
        arrivals = []
        asked = time.perf_counter()
        for start in range(0, min(most, len(prompt)), params.n_batch):
            token = forward(prompt[start : min(most, start + params.n_batch)])
        if len(prompt) > most:
            set_state(repeated(get_state(), len(prompt)))
        arrivals.append(time.perf_counter() - asked)
        while len(arrivals) < count:
            token = forward([token])
            arrivals.append(time.perf_counter() - asked)
        return arrivals

    built = library.llama_print_system_info().decode().strip()
    return {"llama-cpp-python": version("llama-cpp-python"), "llama.cpp": built}, generate


if __name__ == "__main__":
    file, context, threads, kv_type, *most = sys.argv[1:]
    serve(lambda: load(file, int(context), int(threads), kv_type, int(most[0]) if most else int(context)))
