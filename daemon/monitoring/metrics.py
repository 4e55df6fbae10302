"""Metrics for Prometheus: durations that the engine observes, and its published stats at every scrape."""

from __future__ import annotations

import itertools
import logging
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from wsgiref.simple_server import WSGIRequestHandler

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    Info,
    ProcessCollector,
    start_http_server,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from spilld.errors import ConfigError
from spilld.protocol.messages import Welcome

from .stats import OUTCOMES, TIERS

log = logging.getLogger(__name__)

SCRAPE_S = 5.0
"""Seconds after which a silent connection of a scraper is closed."""

Stats = Callable[[], Mapping[str, object]]
Family = GaugeMetricFamily | CounterMetricFamily
MetricRow = tuple[str, str, str]
"""(metric, name in EngineStats.values(), help); a label of LABELS in a name stands for each value."""

LABELS = {"tier": TIERS, "outcome": OUTCOMES}

GAUGES: tuple[MetricRow, ...] = (
    ("tier_capacity_bytes", "{tier}_budget_bytes", "KV that a tier may hold."),
    ("tier_used_bytes", "{tier}_used_bytes", "Of the tier's capacity, what is taken."),
    ("capacity_blocks", "capacity_blocks", "Blocks of 64 tokens that host memory and disk can hold."),
    ("reserved_blocks", "reserved_blocks", "Blocks that running requests and idle contexts may grow to."),
    ("disk_cached_bytes", "disk_cached_bytes", "Runs on disk, in use or not."),
    ("disk_hole_bytes", "disk_hole_bytes", "Bytes of segment files in which no run lies."),
    ("disk_index_bytes", "disk_index_bytes", "The index of the disk tier, beside its capacity."),
    ("disk_failed", "disk_failure", "1 after a failed write: the disk tier takes nothing more."),
    ("disk_write_budget_bytes", "disk_write_budget_bytes", "Bytes a day that may be written."),
    ("disk_write_left_bytes", "disk_write_left_bytes", "Of the write budget, what is left now."),
    ("staging_bytes", "staging_bytes", "Buffers between disk and memory."),
    ("workspace_bytes", "workspace_bytes", "What a prefill chunk takes besides windows and records."),
    ("requests_running", "requests_running", "Requests that are computed together."),
    ("requests_waiting", "requests_waiting", "Requests that wait for room, or for another on their session."),
    ("requests_paused", "requests_paused", "Requests whose clients do not take what was produced."),
    ("memory_short", "memory_short", "1 while the kernel has less memory left than memory_floor."),
    ("contexts_idle", "contexts_idle", "Contexts in memory on which no request runs."),
)

COUNTERS: tuple[MetricRow, ...] = (
    ("requests", "requests_{outcome}", "Requests that were queued and have ended."),
    ("prompt_tokens", "prompt_tokens", "Tokens of prompts."),
    ("cached_tokens", "cached_tokens", "Tokens of contexts and prompts that needed no prefill."),
    ("generated_tokens", "generated_tokens", "Tokens of answers."),
    ("computed_tokens", "computed_tokens", "Tokens of prompts and answers, as often as each was computed."),
    ("attended_bytes", "{tier}_attended_bytes", "KV read by attention, by the tier that it came from."),
    ("prefix_hits", "prefix_hits", "New contexts whose beginning was stored."),
    ("prefix_misses", "prefix_misses", "New contexts of which no beginning was stored."),
    ("recomputations", "recomputations", "Times that the KV of a request was lost and computed again."),
    ("preemptions", "preemptions", "Running requests that made way for others, to go on later."),
    ("disk_reads", "prefetch_reads", "Extents read from disk."),
    ("disk_read_bytes", "prefetch_bytes_read", "Bytes read from disk."),
    ("disk_written_bytes", "disk_written_bytes", "Bytes of runs written to disk."),
    ("disk_moved_bytes", "disk_moved_bytes", "Bytes of runs moved on disk to close holes."),
    ("disk_evicted_runs", "disk_evicted_runs", "Runs that made room for others."),
    ("disk_read_failures", "prefetch_failures", "Reads that failed; their KV is computed again."),
    ("disk_corrupt_extents", "prefetch_corrupt", "Of the failed reads, what was not as it was written."),
    ("disk_write_failures", "disk_failed_writes", "Runs that could not be written."),
    ("disk_writes_refused", "disk_writes_refused", "Runs that the write budget did not admit."),
    ("prefetch_hits", "prefetch_hits", "Extents that were in memory when attention came to them."),
    ("prefetch_stalls", "prefetch_stalls", "Extents that attention had to wait for."),
    ("prefetch_stall_seconds", "prefetch_stall_seconds", "How long attention waited for them."),
)


def _decades(first: int, last: int) -> tuple[float, ...]:
    """Return 1, 2.5 and 5 times each power of ten from 10**first to 10**last."""
    return tuple(float(f"{step}e{power}") for power in range(first, last + 1) for step in ("1", "2.5", "5"))


IO = _decades(-4, 1)
TOKEN = _decades(-3, 1)
REQUEST = _decades(-2, 3)
ROWS = tuple(2.0**power for power in range(13))


class Metrics:
    """The numbers of one daemon, in a registry of their own.

    The engine observes the histograms, which takes a few microseconds each; everything else is read from its
    published stats when a scrape asks.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.queue = self._histogram("queue_seconds", "From a request's arrival to its first step.", REQUEST)
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", REQUEST
        )
        self.next_token = self._histogram(
            "inter_token_seconds", "From one token of an answer to the next.", TOKEN
        )
        self.step = self._histogram("step_seconds", "A step of all running requests.", TOKEN)
        self.rows = self._histogram("step_rows", "Tokens computed in a step.", ROWS)
        self.disk_read = self._histogram("disk_read_seconds", "An extent read from disk, verified.", IO)
        self.disk_write = self._histogram("disk_write_seconds", "A run written to disk, durable.", IO)
        self._errors = Counter("spilld_errors", "Errors sent to clients.", ["code"], registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram("spilld_" + name, text, buckets=buckets, registry=self.registry)

    def failed(self, code: str) -> None:
        """Count an error that was sent to a client. Thread-safe."""
        self._errors.labels(code).inc()

    def follow(self, stats: Stats, welcome: Welcome) -> None:
        """Read these statistics at every scrape from now on."""
        served = {name: getattr(welcome, name) for name in ("version", "model", "dtype", "format")}
        Info("spilld", "What is served.", registry=self.registry).info(served)
        self.registry.register(_FromStats(stats))

    @contextmanager
    def served(self, address: str | None) -> Iterator[str]:
        """Answer scrapes at host:port within the context, in threads of their own, and yield the URL.

        Args:
            address: None serves no metrics, and yields an empty URL.

        Raises:
            ConfigError: The address cannot be bound.
        """
        if address is None:
            yield ""
            return
        host, _, port = address.rpartition(":")
        try:
            server, _ = start_http_server(int(port), host.strip("[]"), self.registry)
        except OSError as error:
            raise ConfigError(
                f"cannot serve metrics at {address}: {error}; set `metrics` to another"
            ) from error
        server.RequestHandlerClass = _Scrape
        url = f"http://{host}:{server.server_port}/metrics"
        log.info("metrics at %s", url)
        try:
            yield url
        finally:
            server.socket.shutdown(
                socket.SHUT_RDWR
            )  # ends its poll, which otherwise lasts up to half a second
            server.shutdown()
            server.server_close()


class _Scrape(WSGIRequestHandler):
    """Serves one scrape; a connection that sends no request is closed, as each occupies a thread."""

    timeout = SCRAPE_S

    def handle(self) -> None:
        with suppress(TimeoutError):
            super().handle()

    def log_message(self, *_: object) -> None:
        """Log nothing: scrapes are not worth a line."""


class _FromStats(Collector):
    """Gauges and counters of the statistics.

    Numbers that the statistics lack, for example without a disk tier, are left out.
    """

    def __init__(self, stats: Stats) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        values = self._stats()
        families = [_family(GaugeMetricFamily, row, values) for row in GAUGES]
        families += [_family(CounterMetricFamily, row, values) for row in COUNTERS]
        yield from (family for family in families if family.samples)


def _family(kind: type[Family], row: MetricRow, values: Mapping[str, object]) -> Family:
    name, source, text = row
    labels = [label for label in LABELS if f"{{{label}}}" in source]
    family = kind("spilld_" + name, text, labels=labels)
    for choice in itertools.product(*(LABELS[label] for label in labels)):
        key = source.format(**dict(zip(labels, choice, strict=True)))
        if key in values:
            family.add_metric(choice, _number(values[key]))
    return family


def _number(value: object) -> float:
    """Return a number as it is, and a text as 1 unless it is empty."""
    return float(value if isinstance(value, int | float) else bool(value))
