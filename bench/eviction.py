"""How much of what requests ask of the prefix store is missing, by the policy that evicts its runs?

Three synthetic traces, each generated from a seed and none of them recorded from users. A request touches a
chain of runs from its root on; what follows the first run that is missing is computed again and cached.

- chats: 300 conversations whose popularity is Zipf's, each below one of 4 system prompts. A request touches
  the history of its conversation and adds one turn to it, up to 40 turns; then another takes its place.
- scan: 8 system prompts, Zipf again, each time with a question that is asked once; every fourth request reads
  a long document instead, which nobody asks for again.
- agent: 4 tasks one after the other, each 10 rounds over its 40 contexts in the same order, all below one
  prompt. A task works on a quarter of all bytes: the 20 % cache is a little smaller than the loop, the worst
  case of LRU; the 5 % one is much smaller, and the 50 % one holds the loop.

ours is S3-FIFO as in offload/prefix_cache/eviction.py, the baseline LRU (bench/lru.py), each with room for
a share of all distinct bytes of the trace. A run is of 1 to 8 blocks, which stand for bytes: all have the
same size. The runs of the request at hand are leased. First touches count as missing, so no rate can be 0.

What bounds the result: Belady's rule on the same trace, which knows the future. After each request the runs
whose next use is farthest leave, or are not kept at all, the end of a chain first. That is the optimum for
runs of one size; as sizes differ, it is the greedy approximation in bytes, and the optimum may be a little
lower. Times play no part.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from harness import Goal, Result, main, say
from lru import Lru

from spilld.offload.prefix_cache.eviction import Eviction, Policy, S3Fifo

BENCH = "eviction"
SEED = 20231023
SHARES = (0.05, 0.2, 0.5)
FULL_RUN = 8
NEVER = 1 << 62


@dataclass(frozen=True)
class Run:
    number: int
    nbytes: int


Chain = tuple[Run, ...]
Trace = list[Chain]


class Source:
    """Runs that were never seen before, and the dice."""

    def __init__(self) -> None:
        self.dice = random.Random(SEED)
        self._made = 0

    def full(self, count: int) -> Chain:
        return tuple(self._run(FULL_RUN) for _ in range(count))

    def mixed(self, count: int) -> Chain:
        return tuple(self._run(self.dice.randint(1, FULL_RUN)) for _ in range(count))

    def zipf(self, count: int, draws: int) -> list[int]:
        """Numbers below count; n is drawn 1 / (n + 1) times as often as 0."""
        return self.dice.choices(range(count), [1 / (n + 1) for n in range(count)], k=draws)

    def _run(self, nbytes: int) -> Run:
        self._made += 1
        return Run(self._made, nbytes)


def chats() -> Trace:
    source = Source()
    prompts = [source.full(3) for _ in range(4)]
    histories: dict[int, Chain] = {}
    trace = []
    for chat in source.zipf(300, draws=3000):
        prompt = prompts[chat % 4]
        history = histories.get(chat, prompt)
        if len(history) == len(prompt) + 40:
            history = prompt
        histories[chat] = history + source.mixed(1)
        trace.append(histories[chat])
    return trace


def scan() -> Trace:
    source = Source()
    prompts = [source.full(4) for _ in range(8)]
    return [
        source.full(source.dice.randint(8, 24)) if i % 4 == 3 else prompts[prompt] + source.mixed(1)
        for i, prompt in enumerate(source.zipf(8, draws=1000))
    ]


def agent() -> Trace:
    source = Source()
    prompt = source.full(4)
    tasks = [[prompt + source.mixed(6) for _ in range(40)] for _ in range(4)]
    return [context for contexts in tasks for _ in range(10) for context in contexts]


class Cache:
    """Runs within a quota, evicted by a policy."""

    def __init__(self, policy: Callable[[], Policy], quota: int) -> None:
        self._eviction = Eviction(policy)
        self._quota = quota
        self._keys: dict[Run, bytes] = {}
        self._chains: dict[bytes, Chain] = {}
        self._children: dict[Run, int] = {}
        self._asked: set[Run] = set()
        """Runs of the request at hand, which are leased."""
        self._made = 0

    def request(self, chain: Chain) -> int:
        """The bytes that were missing. What does not fit beside the rest of the request is not cached."""
        cached = next((i for i, run in enumerate(chain) if run not in self._keys), len(chain))
        self._asked = set(chain)
        for run in chain[:cached]:
            self._eviction.hit(self._keys[run])
            self._eviction.hold(self._keys[run])
        for i in range(cached, len(chain)):
            if not self._make_room(chain[i].nbytes):
                break
            self._insert(chain[: i + 1])
        for run in chain:
            if run in self._keys and not self._children[run]:
                self._eviction.release(self._keys[run])
        return sum(run.nbytes for run in chain[cached:])

    def _make_room(self, nbytes: int) -> bool:
        while self._eviction.used_bytes + nbytes > self._quota:
            if (entry := self._eviction.take()) is None:
                return False
            *ancestors, run = self._chains.pop(entry.key)
            del self._keys[run], self._children[run]
            if ancestors:
                self._children[ancestors[-1]] -= 1
                if not self._children[ancestors[-1]] and ancestors[-1] not in self._asked:
                    self._eviction.release(self._keys[ancestors[-1]])
        return True

    def _insert(self, chain: Chain) -> None:
        """The last run, under a key that was never used before; it is leased."""
        *ancestors, run = chain
        self._made += 1
        key = self._made.to_bytes(16, "big")
        self._eviction.insert(key, run.nbytes, content=run.number.to_bytes(32, "big"))
        self._eviction.hold(key)
        self._keys[run] = key
        self._chains[key] = chain
        self._children[run] = 0
        if ancestors:
            self._children[ancestors[-1]] += 1


def replay(policy: Callable[[], Policy], trace: Trace, quota: int) -> int:
    """Bytes missed."""
    cache = Cache(policy, quota)
    return sum(cache.request(chain) for chain in trace)


def belady(trace: Trace, quota: int) -> int:
    """Bytes missed by who knows the future. An ancestor is used no later than what lies below it, so it stays
    as long."""
    following = next_uses(trace)
    cached: dict[Run, int] = {}
    farthest: list[tuple[int, int, int, Run]] = []
    used = missed = 0
    for chain, next_use in zip(trace, following, strict=True):
        for depth, (run, at) in enumerate(zip(chain, next_use, strict=True)):
            if run not in cached:
                missed += run.nbytes
                used += run.nbytes
            cached[run] = at
            heapq.heappush(farthest, (-at, -depth, run.number, run))
        while used > quota:
            at, _, _, run = heapq.heappop(farthest)
            if cached.get(run) == -at:  # else it was used since, or has left
                del cached[run]
                used -= run.nbytes
    return missed


def next_uses(trace: Trace) -> list[list[int]]:
    """For each run of each request, the number of the next request that touches it."""
    upcoming: dict[Run, int] = {}
    found = []
    for i in range(len(trace) - 1, -1, -1):
        found.append([upcoming.get(run, NEVER) for run in trace[i]])
        upcoming.update(dict.fromkeys(trace[i], i))
    return found[::-1]


def compare(name: str, trace: Trace) -> Sequence[Result]:
    footprint = sum(run.nbytes for run in {run for chain in trace for run in chain})
    asked = sum(run.nbytes for chain in trace for run in chain)
    results = []
    for share in SHARES:
        quota = int(share * footprint)
        say(f"{name}: {len(trace)} requests for {asked} blocks, room for {quota} of {footprint}")
        results.append(
            Result(
                bench=BENCH,
                metric="bytes missed",
                case=f"{name}, {share:.0%} cached",
                unit="share",
                ours=replay(S3Fifo, trace, quota) / asked,
                baseline=replay(Lru, trace, quota) / asked,
                limit=belady(trace, quota) / asked,
                goal=Goal("ratio", 1.0),
            )
        )
    return results


def measure() -> tuple[dict[str, float], list[Result]]:
    traces = {"chats": chats(), "scan": scan(), "agent": agent()}
    return {}, [result for name, trace in traces.items() for result in compare(name, trace)]


if __name__ == "__main__":
    main(__doc__, measure)
