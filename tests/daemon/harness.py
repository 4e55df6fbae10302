"""An engine in this thread: requests go in, turns are run until they end, events come out."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from spilld.assembly import build_engine, use_threads
from spilld.attention.device.tier import Tier
from spilld.config.config import Config
from spilld.demo.plain_transformers import greedy_tokens
from spilld.demo.spawn import Spawned
from spilld.engine.engine import Engine
from spilld.kv.attention_span import BLOCK, WINDOW_TOKENS, Sliding
from spilld.kv.geometry import Geometry
from spilld.models.model import Model, load
from spilld.offload.disk.tier import DiskTier
from spilld.offload.host import residency
from spilld.offload.host.residency import Holding, Spill
from spilld.offload.kernels import threads
from spilld.offload.record import Element, Format
from spilld.offload.store.host_space import Planner
from spilld.protocol.messages import (
    Done,
    Event,
    Failed,
    Generate,
    Reply,
    Resume,
    Token,
)
from spilld.requests.request_state import NO_CLIENT, Phase

from .forked import spawned
from .tiny_models import VOCAB, build

CLIENT = b"test"


class Harness:
    """An engine and what it has said, by request id."""

    def __init__(
        self, config: Config, model: Model, planner: Planner = residency.plan, tier: Tier | None = None
    ) -> None:
        self.events: dict[str, list[Event]] = {}
        self.config = config
        self._from: dict[str, int] = {}
        self.engine: Engine = build_engine(config, model, self._post, planner, tier=tier)

    def _post(self, client: bytes, event: Reply) -> None:
        if client == NO_CLIENT:
            return
        assert client == CLIENT
        assert isinstance(event, Event)
        seen = self.events.setdefault(event.request_id, [])
        due = seen[-1].seq + 1 if seen else self._from.get(event.request_id, 0)
        assert event.seq == due, "events are numbered without gaps"
        seen.append(event)

    def resume(self, request_id: str, next_seq: int = 0, tenant: str = "") -> None:
        """Be the client of a request that has all events before next_seq."""
        self._from[request_id] = next_seq
        self.events[request_id] = []
        for event in self.engine.subscriptions.resume(
            CLIENT, Resume(request_id=request_id, next_seq=next_seq, tenant=tenant)
        ):
            self._post(CLIENT, event)

    def add(self, request_id: str, prompt: Sequence[int], **fields: Any) -> None:
        request = Generate(request_id=request_id, prompt=tuple(prompt), **fields)
        self.engine.add(CLIENT, request, list(prompt))

    def run(self) -> None:
        """Turn until nothing is left to do, then look whether every byte is accounted for."""
        while self.engine.turn() or self._coming_back:
            pass
        self.engine.rest()
        self.engine.check_integrity()

    @property
    def _coming_back(self) -> bool:
        return any(not state.unread for state in self.engine.requests.in_phase(Phase.PREEMPTED))

    def ask(self, prompt: Sequence[int], request_id: str = "r", **fields: Any) -> list[int]:
        """The tokens of one request that runs alone."""
        self.events.pop(request_id, None)
        self._from.pop(request_id, None)
        self.add(request_id, prompt, **fields)
        self.run()
        return self.tokens(request_id)

    def tokens(self, request_id: str = "r") -> list[int]:
        last = self.events[request_id][-1]
        if isinstance(last, Failed):
            raise last.error()
        return [event.token for event in self.events[request_id] if isinstance(event, Token)]

    def done(self, request_id: str = "r") -> Done:
        last = self.events[request_id][-1]
        assert isinstance(last, Done), last
        return last


@contextmanager
def engine(
    model: Model,
    state: Path,
    planner: Planner = residency.plan,
    keep_state: bool = False,
    tier: Tier | None = None,
    **settings: Any,
) -> Iterator[Harness]:
    """An engine over a model in a state folder that goes with it unless it is to be kept.

    One thread: for tiny models, and on a machine that others use too, threads that wait for each other take
    many times as long.
    """
    dtype = str(model.module.dtype).removeprefix("torch.")
    config = Config.load(None, {"dtype": dtype, "state": str(state), **settings})
    with one_thread():
        harness = Harness(config, model, planner, tier)
        try:
            yield harness
        finally:
            harness.engine.close()
            if not keep_state:
                shutil.rmtree(state, ignore_errors=True)


@contextmanager
def daemon(model: Model, **settings: Any) -> Iterator[Spawned]:
    """A process that serves the model in float32, with one thread."""
    chosen = {"model": model.folder, "cache": model.folder / "cache", "dtype": "float32", "threads": 1}
    with spawned({**chosen, **settings}) as running:
        yield running


@contextmanager
def one_thread() -> Iterator[None]:
    """torch and numba compute in this thread alone."""
    before = torch.get_num_threads(), threads.used()
    use_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        threads.use(before[1])


def column_bytes(model: Model, form: str, dtype: str = "float32") -> int:
    """Bytes of one block in every layer."""
    return model.geometry.layouts(Format(form), Element(dtype)).column_bytes


def random_split(seed: int, run_blocks: int = 0) -> Planner:
    """A planner that spills runs from anywhere, of any length, more than it is asked to."""
    draw = random.Random(seed)

    def plan(holdings: Sequence[Holding], columns: int, run: int) -> list[Spill]:
        spills = []
        spans = [(i, span) for i, holding in enumerate(holdings) for span in holding.blocks]
        draw.shuffle(spans)
        for index, span in spans:
            if columns <= 0 and draw.random() < 0.5:
                continue
            count = min(len(span), run_blocks or run, draw.randint(1, run))
            first = draw.randint(span.start, span.stop - count)
            spills.append(Spill(index, first, count))
            columns -= count
        return spills

    return plan


def reference(folder: Path, attention: str = "sdpa") -> Any:
    """The same weights in plain transformers, float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention, local_files_only=True
    ).eval()


def greedy(module: Any, prompt: Sequence[int], count: int) -> list[int]:
    """Greedy tokens of plain transformers, end-of-text ignored."""
    return list(islice(greedy_tokens(module, prompt), count))


def changed(geometry: Geometry, sliding_windows: Sequence[Sliding] | None = None, **fields: Any) -> Geometry:
    """That of another model: sliding_windows of its layers, fields of each of them."""
    windows = sliding_windows or [layer.sliding_window for layer in geometry.layers]
    first = geometry.layers[0]
    shapes = [
        replace(first, sliding_window=window, module_layer=i, **fields) for i, window in enumerate(windows)
    ]
    return replace(geometry, layers=tuple(shapes))


def load_tiny(folder: Path) -> Model:
    return load(folder, "float32", cache=folder / "cache")


_SHARED: dict[Path, Model] = {}


def shared(factory: pytest.TempPathFactory, family: str, **changes: Any) -> Model:
    """A tiny model that all tests of a run share."""
    folder = factory.getbasetemp() / "-".join([family, *(f"{k}={v}" for k, v in sorted(changes.items()))])
    if folder not in _SHARED:
        _SHARED[folder] = load_tiny(build(family, folder, **changes))
    return _SHARED[folder]


def some_tokens(seed: int, count: int) -> list[int]:
    """Tokens that are not special."""
    found: list[int] = np.random.default_rng(seed).integers(4, VOCAB, count).tolist()
    return found


def window_bytes(model: Model, dtype: str = "float32") -> int:
    """Device bytes of one sequence's window."""
    return model.geometry.token_numbers * WINDOW_TOKENS * Element(dtype).nbytes


def disk_tier(harness: Harness) -> DiskTier:
    """For faults: its `system` may be replaced."""
    disk = harness.engine._store._disk
    assert disk is not None
    return disk.tier


def said(harness: Harness, request_id: str) -> int:
    """How many tokens a request has produced so far."""
    return sum(isinstance(event, Token) for event in harness.events.get(request_id, []))


def smallest_host_budget(model: Model, form: str = "k8v4", chunk: int = 512) -> int:
    """What is accepted at the least, so that most of a long sequence must go to disk."""
    return (chunk // BLOCK + 8) * column_bytes(model, form)
