"""Sink logits: a learned logit of each head that takes part in the softmax and has no value.

gpt-oss has them (arXiv:2508.10925, section 2.1); Xiao et al. 2023 (arXiv:2309.17453) call the idea attention
sinks, which here are tokens.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def join_sink_logits(sink_logits: torch.Tensor, out: Floats, lse: Floats) -> None:
    """Let sink logits take part in a finished attention: one more partial, whose output is zero.

    Args:
        sink_logits: [heads], of any floating dtype.
        out: [rows, heads, head_dim] float32, merged over everything that the rows see; it is updated.
        lse: [rows, heads] float32, its log-sum-exp.
    """
    sinks = sink_logits.detach().float().cpu().numpy()
    out *= np.exp(lse - np.logaddexp(lse, sinks))[..., None]
