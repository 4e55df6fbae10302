"""Attention over all tiers: the interface, the CPU's, that over stored records, transformers' way to it.

May import: cuda_ext, errors, kv, offload.
"""
