"""The model runner: forward passes over packed batches, sequences' windows and records, sampling.

May import: attention, config, cuda_ext, errors, kv, models, offload, protocol, scheduler.
"""
