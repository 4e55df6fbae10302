"""Kernels that attend over windows and records in place, without copying them.

May import: offload.kernels, offload.record.
"""
