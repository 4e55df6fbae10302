"""The engine: takes requests in, runs steps, hands events back; one thread runs it all.

May import: config, cuda_ext, engine.sessions, errors, kv, models, monitoring, offload, protocol, requests,
runner, scheduler, sessions, tokenizer.
"""
