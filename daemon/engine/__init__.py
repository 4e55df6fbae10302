"""The engine: takes requests in, runs steps, hands events back; one thread runs it all.

May import: config, cuda_ext, errors, kv, models, monitoring, offload, protocol, runner, scheduler, sessions,
tokenizer.
"""
