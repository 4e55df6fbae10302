"""Every numba kernel of the project: threads, cache and vectors here, the kernels in the rooms below.

May import: offload.record.
"""
