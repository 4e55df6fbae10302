"""Parity: a small model of a config, computed through spilld's attention and through transformers' own.

May import: attention, cuda_ext, errors, kv, models.families, offload.
"""
