"""What sessions are to the engine: continued, left behind, listed and changed, exported and imported.

May import: errors, fields, kv, models, offload, protocol, requests, runner, sessions, tokenizer.
"""
