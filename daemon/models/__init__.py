"""From a model's name to a model in memory: found, converted, checked, loaded.

May import: attention, config, cuda_ext, errors, kv, models.families, models.files, models.gguf,
models.packed, models.parity, models.quantised, offload, tokenizer.
"""
