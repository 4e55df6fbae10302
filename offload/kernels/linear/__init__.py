"""Kernels of a step over packed weights: products, and what lies between them.

May import: offload.kernels.
"""
