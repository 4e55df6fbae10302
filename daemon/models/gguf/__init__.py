"""GGUF files: header, metadata, tensors.

May import: errors, offload.
"""
