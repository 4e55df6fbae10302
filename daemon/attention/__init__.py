"""Attention over all tiers: the interface, the CPU, the GPU, stored records, the device's copies of them.

May import: config, cuda_ext, errors, kv, offload.
"""
