"""Requests in the engine: each in one phase, found by number, id and session.

May import: errors, kv, models, offload, protocol, runner, scheduler, sessions, tokenizer.
"""
