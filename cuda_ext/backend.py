"""The interface of a device: where windows live and where attention over them runs."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from .window import WindowArena, WindowShape

Partial = tuple[torch.Tensor, torch.Tensor]
"""(output, log-sum-exp of the logits), both float32: what merges exactly."""


class Backend(Protocol):
    device: torch.device
    tile_dtype: torch.dtype
    """The dtype in which attend_tile is fastest: queries, keys and values come in it."""

    def windows(self, shape: WindowShape, budget_bytes: int) -> WindowArena:
        """Room for as many windows as the budget holds; ValueError if that is none."""

    def append_one(
        self, planes: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slots: tuple[int, ...]
    ) -> None:
        """Write a token's k and v [kv_heads, head_dim] to some slots of a window.

        planes [2, kv_heads, slots, head_dim]: its keys and values.
        """

    def attend_one(
        self,
        q: torch.Tensor,
        planes: torch.Tensor,
        ranges: npt.NDArray[np.int64],
        scale: float,
        softcap: float,
    ) -> Partial:
        """One query over slots of a window.

        q float32 [heads, head_dim]; planes [2, kv_heads, slots, head_dim]; ranges int64 [n, 2]: visible slots
        [start, stop). Returns output [heads, head_dim] and lse [heads].
        """

    def mask(self, hidden: torch.Tensor, group: int) -> torch.Tensor:
        """What attend_tile takes as `mask`, for reuse in every layer.

        hidden bool [M, N] is True where a query does not see a token; each query must see at least one.
        """

    def attend_tile(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
        softcap: float,
    ) -> Partial:
        """Many queries over a tile.

        q [kv_heads, group, M, head_dim]; k, v [kv_heads, N, head_dim], contiguous; without a mask every
        query sees every token. Returns output [kv_heads, group, M, head_dim] and lse [kv_heads, group, M].
        """
