"""A sequence's KV as numbers: geometry, what a token sees, the batch of a step, window checkpoints.

May import: cuda_ext, errors, offload.
"""
