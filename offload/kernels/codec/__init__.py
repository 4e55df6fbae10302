"""Kernels that pack blocks into records and unpack them.

May import: offload.kernels, offload.record.
"""
