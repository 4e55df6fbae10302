"""Where a model's weights lie and are multiplied: the CPU, or with torch the GPU that has the windows.

torch and cuda_ext share the GPU's primary context, but a model's tensors pass between them through host
memory. Only flash attention (cuda_ext/flash.py) has torch work on our streams, over our memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from spilld.config.config import Config

IN_TORCH = ("auto", "bf16")
"""Values of Config.weights that a GPU can have: the others are codes for the CPU's kernels."""


class Placement(NamedTuple):
    """Where the weights are to lie."""

    device: str
    """torch's name: "cpu" or "cuda"."""
    missing: str = ""
    """Why it is not the configured GPU, and what to do; empty otherwise."""


def place(config: Config) -> Placement:
    """Return where the weights are to lie, by the configuration and this torch."""
    if config.device != "cuda" or config.weights not in IN_TORCH:
        return Placement("cpu")
    if torch.cuda.is_available():
        return Placement("cuda")
    if torch.version.cuda is None:
        return Placement(
            "cpu",
            "this torch is built without CUDA: weights stay on the CPU; install one that is built for it",
        )
    return Placement(
        "cpu", "torch finds no GPU: weights stay on the CPU; nvidia-smi says what the driver finds"
    )
