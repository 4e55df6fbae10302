"""Devices: memory, streams, events and kernels of a GPU through its driver, and of the CPU.

May import: cuda_ext.compile, cuda_ext.errors.
"""
