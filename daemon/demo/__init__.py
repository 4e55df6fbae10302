"""The main job, shown and compared: `spilld demo`, plain transformers, a daemon as a child process.

May import: cli, client, config, errors, kv, models, offload, protocol, tokenizer.
"""
