"""Packed weights of a model for its steps, and which modules they may stand for.

May import: errors, models.files, models.gguf, offload.
"""
