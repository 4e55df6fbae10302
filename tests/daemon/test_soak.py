"""Many clients at once on one daemon, at random: streams are read, read slowly, cancelled and abandoned.

Nothing fails that was not asked to, every whole stream is what the same request gives alone, nothing is lost.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from spilld import (
    AsyncClient,
    AsyncGeneration,
    Client,
    Token,
)
from spilld.demo.spawn import Spawned
from spilld.models.model import Model

from .harness import column_bytes, daemon, engine, shared, some_tokens, window_bytes

CLIENTS = 64
PROMPTS = [some_tokens(seed, length) for seed, length in enumerate((5, 60, 200, 300, 511, 700, 1024, 1500))]
MOST = 24
"""Tokens of an answer."""

SLOW_S = 0.1
"""Between two events of a slow reader."""

GROWTH = 32 << 20
"""Bytes by which the daemon may grow after a third of the time."""

WAYS = {"read": 6, "slow": 2, "cancel": 2, "leave": 1}
"""What becomes of a stream, and how often."""


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return shared(tmp_path_factory, "llama")


@pytest.fixture(scope="module")
def expected(model: Model, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """Each prompt's answer, alone."""
    with engine(model, tmp_path_factory.mktemp("alone"), format="exact", disk_budget=0) as harness:
        return [harness.ask(prompt, max_tokens=MOST, ignore_eos=True) for prompt in PROMPTS]


@pytest.fixture
def running(model: Model) -> Iterator[Spawned]:
    """Four windows, and less host memory than a few of the prompts take."""
    settings = {
        "format": "exact",
        "device_budget": 4 * window_bytes(model),
        "host_budget": 24 * column_bytes(model, "exact"),
        "disk_budget": "256MiB",
        "chunk_tokens": 256,
        "max_queue": 4 * CLIENTS,
        "retention_s": 1,
    }
    with daemon(model, **settings) as process:
        yield process


@dataclass
class Crowd:
    """Clients that go on until a time."""

    address: str
    expected: list[list[int]]
    until: float
    draw: random.Random
    ended: Counter[str] = field(default_factory=Counter)

    async def client(self) -> None:
        """One place in the crowd: who leaves is followed by another."""
        while time.monotonic() < self.until:
            async with AsyncClient(self.address, connect_timeout=10) as client:
                while time.monotonic() < self.until:
                    way = self.draw.choices(list(WAYS), list(WAYS.values()))[0]
                    await self.stream(client, way)
                    self.ended[way] += 1
                    if way == "leave":
                        break

    async def stream(self, client: AsyncClient, way: str) -> None:
        which, count = self.draw.randrange(len(PROMPTS)), self.draw.randint(1, MOST)
        generation = client.generate(PROMPTS[which], max_tokens=count, ignore_eos=True)
        if way in ("cancel", "leave"):
            await self.begin(generation, self.draw.randint(0, count))
            if way == "cancel":
                await generation.aclose()
            return
        tokens = []
        async for event in generation:
            if isinstance(event, Token):
                tokens.append(event.token)
            await asyncio.sleep(SLOW_S if way == "slow" else 0)
        assert tokens == self.expected[which][:count]

    async def begin(self, generation: AsyncGeneration, tokens: int) -> None:
        """Read so many tokens; none: not even whether it was taken."""
        async for event in generation:
            tokens -= isinstance(event, Token)
            if tokens <= 0:
                return


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096


def settled(address: str) -> dict[str, object]:
    """What the daemon says once nothing runs and no memory is taken."""
    give_up = time.monotonic() + 30
    with Client(address) as client:
        while True:
            stats = client.stats()
            busy = ("requests_running", "requests_waiting", "device_used_bytes", "host_used_bytes")
            if not any(stats[name] for name in busy):
                return stats
            assert time.monotonic() < give_up, f"it never settles: {stats}"
            time.sleep(0.05)


@pytest.mark.parametrize("seconds", [6, pytest.param(600, marks=pytest.mark.slow)])
def test_a_crowd(running: Spawned, expected: list[list[int]], seconds: int) -> None:
    sizes: list[int] = []

    async def watch() -> None:
        await asyncio.sleep(seconds / 3)
        sizes.append(resident_bytes(running.pid))

    async def all_of_them() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(watch())
            for _ in range(CLIENTS):
                group.create_task(crowd.client())

    crowd = Crowd(running.address, expected, time.monotonic() + seconds, random.Random(seconds))
    asyncio.run(all_of_them())
    stats = settled(running.address)
    sizes.append(resident_bytes(running.pid))
    print(f"{dict(crowd.ended)} streams in {seconds} s; resident MiB {[size >> 20 for size in sizes]}")
    assert set(crowd.ended) == set(WAYS), "each way was gone"
    assert stats["disk_used_bytes"], "the disk was of use"
    assert sizes[1] - sizes[0] <= GROWTH
