"""The CUDA kernels, their Python face, and devices.

Kernels are in kernels/ (.cu), their evidence without a GPU in README.md. Nothing here imports the rooms of
the daemon, or offload.
"""
