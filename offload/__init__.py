"""The tiered store: records of KV in host memory and on disk. Numpy in, numpy out, no torch.

Its rooms hold the parts; store.py composes them. Nothing here imports the rooms of the daemon, or cuda_ext.
"""
