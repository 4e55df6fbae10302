"""Attention over all tiers, on the CPU and over stored records; transformers' way to it and to states.

May import: cuda_ext, errors, kv, offload.
"""
