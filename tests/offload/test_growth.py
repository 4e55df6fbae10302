"""What an operation costs does not grow with what is stored: instructions are counted, not time."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from spilld.offload.block_table import BlockTable, RunRef
from spilld.offload.disk.files.extent import RunKey, extent_bytes
from spilld.offload.disk.files.segment import Range, SegmentSpace
from spilld.offload.disk.index.index_row import Contents
from spilld.offload.prefix_cache.run_cache import RunCache

from .faults import ScriptedSystem
from .run_tier import RunTier
from .tier_contract import FINGERPRINT, LAYERS, LAYOUT, LAYOUTS, blocks, chain, key

PAGE = 4096
RUN_BYTES = LAYERS * extent_bytes(LAYOUT, 1)


def steps(work: Callable[[], object]) -> int:
    """How many instructions of Python the work takes."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def assert_constant(cost: Callable[[int], int], few: int, many: int) -> None:
    cost(few)  # what is imported and compiled the first time
    small, large = cost(few), cost(many)
    assert large < 1.2 * small + 50, f"{small} steps with {few} entries, {large} with {many}"


def test_steps_are_counted() -> None:
    assert steps(lambda: [n * n for n in range(1000)]) > 3000
    assert steps(lambda: None) < 10


class TestSegments:
    """Files of eight ranges each."""

    def space(self, segments: int) -> tuple[SegmentSpace, list[Range]]:
        space, taken = SegmentSpace(1 << 40, segment_bytes=8 * PAGE), []
        for _ in range(8 * segments):
            taken.append(space.find(PAGE))
            space.take(taken[-1])
        return space, taken

    def test_take_and_give_back(self) -> None:
        def cost(segments: int) -> int:
            space, taken = self.space(segments)

            def work() -> None:
                for place in taken[1 : 8 * 20 : 8]:
                    space.give_back(place)
                for _ in range(20):
                    space.take(space.find(PAGE))
                space.take(space.find(PAGE))

            return steps(work)

        assert_constant(cost, 30, 600)

    def test_the_next_move(self) -> None:
        def cost(segments: int) -> int:
            space, taken = self.space(segments)
            for place in taken[::3]:
                space.give_back(place)
            return steps(lambda: (next(space.moves()), space.hole_bytes))

        assert_constant(cost, 30, 600)

    def test_the_next_move_among_full_files(self) -> None:
        def cost(segments: int) -> int:
            space, taken = self.space(segments)
            space.give_back(taken[-3])
            return steps(lambda: next(space.moves()))

        assert_constant(cost, 30, 600)


class TestDisk:
    """A tier with many runs, each of one block of its own history."""

    def tier(self, folder: Path, runs: int, beyond: int = 0) -> RunTier:
        budget = (runs + beyond) * RUN_BYTES
        tier = RunTier(
            folder / f"{len(list(folder.iterdir()))}",
            budget,
            LAYOUTS,
            FINGERPRINT,
            ScriptedSystem(),
            segment_bytes=8 * RUN_BYTES,
        )
        for n in range(runs):
            tier.put(key(n), 1, chain(n), blocks(n, 1), contents(n))
        return tier

    def test_room_for_a_run_where_others_must_go(self, tmp_path: Path) -> None:
        def cost(runs: int) -> int:
            tier = self.tier(tmp_path, runs)
            cache = RunCache(tier, 1 << 20)
            cache.acquire([key(n) for n in range(runs // 2)])

            def work() -> None:
                for n in range(10):
                    reserve(cache, 10_000 + n)

            reserve(cache, 9_000)  # what is held is passed once
            count = steps(work)
            tier.close()
            return count

        assert_constant(cost, 40, 400)

    def test_a_pinned_share(self, tmp_path: Path) -> None:
        def cost(runs: int) -> int:
            tier = self.tier(tmp_path, runs)
            cache = RunCache(tier, 1 << 20)
            cache.pin([key(n) for n in range(runs)])
            count = steps(lambda: cache.pinned_bytes)
            tier.close()
            return count

        assert_constant(cost, 40, 400)

    def test_a_move(self, tmp_path: Path) -> None:
        def cost(runs: int) -> int:
            tier = self.tier(tmp_path, runs)
            for n in range(0, runs, 3):
                tier.delete(key(n))

            def work() -> None:
                move = tier.relocate(1 << 20)
                assert move is not None
                tier.moved(move)

            count = steps(work)
            tier.close()
            return count

        assert_constant(cost, 40, 400)

    def test_a_delete(self, tmp_path: Path) -> None:
        def cost(runs: int) -> int:
            tier = self.tier(tmp_path, runs)
            count = steps(lambda: tier.delete(key(runs // 2)))
            tier.close()
            return count

        assert_constant(cost, 40, 400)


def contents(n: int) -> Contents:
    return Contents(chain(1_000_000 + n), (chain(n),))


def reserve(cache: RunCache, n: int) -> None:
    cache.reserve(RunKey(key(n)), first=1, count=1, chain=chain(n), contents=contents(n), layouts=LAYOUTS)


def test_who_is_asked_every_step_about_a_long_sequence() -> None:
    """Its runs are not passed one by one."""

    def cost(runs: int) -> int:
        table = BlockTable(2)
        table.reach(4 * runs + 8)
        table.chain.extend(bytes(32) for _ in range(4 * runs + 9))
        table.add_runs(RunRef(key(n), 4 * n + 1, 4 * n + 1, 4) for n in range(runs))
        table.rows[:, 4 * runs + 1 :] = range(8)
        table.sealed = table.stop
        window = range(4 * runs - 8, 4 * runs + 9)

        def work() -> None:
            assert table.host_spans() == (range(4 * runs + 1, 4 * runs + 9),)
            assert len(table.runs_to_read(window)) == 3
            assert table.disk_blocks == 4 * runs

        return steps(work)

    assert_constant(cost, 20, 2000)


@pytest.mark.parametrize(
    "statement", ["chain", "checkpoints", "holders", "touch", "move", "remove", "add", "spend"]
)
def test_every_statement_of_the_index_uses_an_index(tmp_path: Path, statement: str) -> None:
    tier = TestDisk().tier(tmp_path, 3)
    index, seen = tier.index, list[str]()
    index._db._db.set_trace_callback(seen.append)
    place = tier.locate(key(1)).range
    row = next(iter(index.entries()))
    seen.clear()
    index.remove([row.identity.run])
    calls: dict[str, Callable[[], object]] = {
        "chain": lambda: index.chain([chain(n) for n in range(3)], 1),
        "checkpoints": lambda: index.checkpoints(chain(1)),
        "holders": lambda: index.holders(chain(1)),
        "touch": index.write_notes,
        "move": lambda: index.move(key(1), Range(9, 0, place.nbytes)),
        "remove": lambda: index.remove([key(2)]),
        "add": lambda: index.add(row),
        "spend": index.spent,
    }
    index.touch([key(1)], 7)
    index.note_spent(1, 2)
    seen.clear()
    calls[statement]()
    index._db._db.set_trace_callback(None)
    asked = [text for text in seen if text.split()[0] in ("SELECT", "UPDATE", "DELETE", "INSERT")]
    assert asked
    plans = [index._db.rows(f"EXPLAIN QUERY PLAN {text}") for text in asked]
    details = [detail for *_, detail in itertools.chain.from_iterable(plans)]
    assert not [detail for detail in details if detail.startswith("SCAN")], details
    tier.index.close()
