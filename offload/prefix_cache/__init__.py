"""Runs on disk across requests: found by the hash of their tokens, evicted when room is needed.

May import: offload.disk, offload.errors, offload.record.
"""
