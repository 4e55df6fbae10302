"""Runs on disk across requests: found by the hash of their tokens, evicted when room is needed.

May import: offload.disk, offload.errors, offload.record, offload.store_layout, offload.table.
"""
