"""Device memory by use: KV windows, the pool of records, staging for what crosses to the host.

May import: cuda_ext.device, cuda_ext.errors.
"""
