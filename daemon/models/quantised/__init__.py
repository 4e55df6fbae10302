"""Quantised model folders: FP8, AWQ, GPTQ, compressed-tensors, MXFP4, NVFP4 and bitsandbytes.

May import: errors, offload.
"""
