"""Kernels that attend over windows and records, where these lie.

May import: offload.kernels, offload.record.
"""
