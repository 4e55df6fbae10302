"""Runs on disk across requests: found by the hash of their tokens, evicted when room is needed.

May import: offload.block_table, offload.disk, offload.errors, offload.record, offload.store_layout.
"""
