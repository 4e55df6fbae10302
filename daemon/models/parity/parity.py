"""The parity check: does a family, run through spilld's attention, compute what it computes by itself?"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import getfile
from pathlib import Path
from typing import Any

import torch

from spilld.attention import cpu, query_scale, state_layers, tile, transformers_hook
from spilld.attention.cpu import CpuAttention
from spilld.attention.transformers_hook import IMPLEMENTATION, PlannedAttention
from spilld.cuda_ext.memory.cpu_windows import CpuKVWindows
from spilld.cuda_ext.memory.windows import KVWindowShape
from spilld.errors import UnsupportedModel
from spilld.kv import geometry as geometries
from spilld.kv import state_geometry
from spilld.kv.attention_span import WINDOW_TOKENS, sealed_by
from spilld.kv.batch import Batch, BatchItem
from spilld.kv.geometry import Geometry
from spilld.kv.recurrent_state import RecurrentState, StateShape
from spilld.kv.sequence import KVSequence
from spilld.models.families.rope import fix_rope
from spilld.offload.host.slab import HostSlab
from spilld.offload.prefix_cache.block_hash import CHAIN_BYTES
from spilld.offload.record import BLOCK, Element, Format
from spilld.offload.store.store import Store

from . import reduced
from .passed_once import pass_once
from .reduced import make, reduced_config

TOLERANCE = 1e-3
"""The largest difference of two logits, as a part of the standard deviation of all."""

PIECE = 150
"""About so many tokens are computed in each step: no block is sealed, so no kernel is compiled for it."""

_OURS = (cpu, query_scale, tile, transformers_hook, state_layers, geometries, state_geometry, reduced)


def check_parity_once(module_class: Any, config: Any, cache: Path) -> None:
    """Run `parity`, unless it has passed before.

    A pass is noted in `cache/parity`, for the same config and the same code, ours and transformers'.

    Raises:
        UnsupportedModel: As in `parity`.
    """
    said = {**config.to_dict(), "_name_or_path": None, "transformers_version": None, "dtype": None}
    code = (__file__, *(str(module.__file__) for module in _OURS), getfile(module_class))
    pass_once("parity", cache, sorted(said.items(), key=str), code, lambda: parity(module_class, config))


def parity(module_class: Any, config: Any) -> float:
    """Compare a reduced model through spilld's attention with the same module by transformers' own.

    Some hundred tokens in one pass are what is right. Through spilld's attention they are computed in two
    pieces, the second beside another sequence.

    Args:
        module_class: The class of transformers, for text.
        config: Its config, as it will be served.

    Returns:
        The largest difference of two logits, as a part of the standard deviation of all.

    Raises:
        UnsupportedModel: They differ, or one of them does not run.
    """
    name = f"{module_class.__name__} of {config.model_type}"
    try:
        found, wanted = _logits(module_class, config)
    except UnsupportedModel:
        raise
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise UnsupportedModel(f"{name} does not run through spilld's attention: {why}") from error
    differs = float((found - wanted).abs().max() / wanted.std())
    if not differs <= TOLERANCE:
        raise UnsupportedModel(
            f"{name} gives other logits through spilld's attention than by itself: they differ by "
            f"{differs:.2g} of their standard deviation, {TOLERANCE} is allowed; this model cannot be served"
        )
    return differs


def _logits(module_class: Any, config: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits [2, tokens, vocab] of two sequences through spilld's attention, and as they should be."""
    module = make(module_class, reduced_config(config))
    if not hasattr(getattr(module, "model", None), "layers"):
        raise UnsupportedModel(f"{module_class.__name__} has no list of layers by that name")
    geometry = Geometry.of(module.config, module.generation_config, None)
    first = -(-PIECE // geometry.grid) * geometry.grid
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, geometry.vocab, (2, first + PIECE), generator=draw)
    with torch.inference_mode():
        wanted = torch.cat([module(input_ids=each[None], use_cache=False).logits for each in tokens])
        module.set_attn_implementation(IMPLEMENTATION)
        fix_rope(module, tokens.shape[1])
        state_layers.keep_states(module, geometry)
        query_scale.tell_positions(module)
        return _Steps(module, geometry, tokens.shape[1]).run(tokens.tolist(), first), wanted


class _Steps:
    """Steps of two sequences with KV in memory, as the runner makes them."""

    def __init__(self, module: Any, geometry: Geometry, longest: int) -> None:
        self._module = module
        layouts = geometry.layouts(Format.EXACT, Element.FLOAT32)
        columns = 2 * -(-longest // BLOCK)
        slab = HostSlab(columns * sum(layouts.record_bytes), layouts.record_bytes)
        self._store = Store(layouts, slab, columns)
        shape = KVWindowShape(WINDOW_TOKENS, geometry.kv_heads, torch.float32)
        self._windows = CpuKVWindows(shape, 2 * shape.nbytes)
        self._attention = CpuAttention(geometry, self._store, self._windows)
        self._states = StateShape.of(geometry, torch.float32)

    def run(self, tokens: Sequence[list[int]], first: int) -> torch.Tensor:
        """Return logits of two sequences: `first` tokens of one, then its others beside the other."""
        try:
            one, other = (self._open(each) for each in tokens)
            begun = self._step([(one, first)])
            beside = self._step([(one, len(one.tokens) - first), (other, len(other.tokens))])
            return torch.stack([torch.cat([begun[0], beside[0]]), beside[1]])
        finally:
            self._attention.close()
            self._store.close()

    def _open(self, tokens: list[int]) -> KVSequence:
        state = None if self._states is None else RecurrentState(self._states)
        sequence = KVSequence(
            self._store.open(), self._windows.take(), bytes(CHAIN_BYTES), tokens, state=state
        )
        self._store.reserve(sequence.table, -(-len(tokens) // BLOCK))
        return sequence

    def _step(self, parts: Sequence[tuple[KVSequence, int]]) -> list[torch.Tensor]:
        for sequence, count in parts:
            newest = sequence.computed + count - 1
            hashes = sequence.hashes(len(sequence.table.chain), sealed_by(newest))
            self._store.grow(sequence.table, hashes)
        items = [BatchItem(sequence, count, sequence.computed) for sequence, count in parts]
        plan = self._attention.plan(Batch(items))
        logits = self._module(
            input_ids=torch.tensor([plan.batch.tokens]),
            position_ids=torch.tensor([plan.batch.positions]),
            use_cache=False,
            spilld_attention=PlannedAttention(self._attention, plan),
        ).logits[0]
        for sequence, count in parts:
            sequence.advance(count)
        return [logits[item.rows] for item in items]
