"""The device tier: KV windows on a device, attention there, its copies of records, what they cost.

May import: attention, config, cuda_ext, errors, kv, offload.
"""
