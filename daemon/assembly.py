"""From a configuration to a running engine: budgets become tiers, a model becomes a service."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from spilld.attention.device.tier import TIERS, DeviceTier, Tier
from spilld.config.config import Config
from spilld.config.reload import Reload
from spilld.cuda_ext.compile.build import BuildError
from spilld.cuda_ext.errors import DeviceError
from spilld.engine.engine import Engine
from spilld.engine.outbox import Post
from spilld.engine.service import EngineService
from spilld.kv.checkpoint import CHECKPOINT_BLOCKS, state_blocks
from spilld.kv.geometry import Geometry
from spilld.kv.recurrent_state import StateShape
from spilld.models.model import (
    Model,
    identify,
    load,
    resolve,
)
from spilld.monitoring.memory import MemoryWatch
from spilld.monitoring.metrics import Metrics
from spilld.monitoring.startup import Startup
from spilld.offload.disk.files.extent import largest_extent
from spilld.offload.disk.index.database import Database
from spilld.offload.disk.prefetch import Prefetcher
from spilld.offload.disk.spiller import Spiller
from spilld.offload.disk.tier import DiskTier
from spilld.offload.errors import (
    BudgetTooSmall,
    FolderInUse,
    FolderUnusable,
    MemoryRefused,
)
from spilld.offload.host import residency
from spilld.offload.host.slab import HostSlab, columns_within
from spilld.offload.kernels import threads
from spilld.offload.maintenance.compaction import Compaction
from spilld.offload.maintenance.wear import WriteBudget
from spilld.offload.prefix_cache.run_cache import RunCache
from spilld.offload.record import (
    BLOCK,
    Element,
    Format,
)
from spilld.offload.store.disk_backend import DiskBackend
from spilld.offload.store.host_space import Planner
from spilld.offload.store.run_length import run_length
from spilld.offload.store.store import Store
from spilld.offload.store_layout import StoreLayout
from spilld.protocol.messages import Welcome
from spilld.runner.placement import place
from spilld.runner.prepare_kernels import prepare
from spilld.runner.runner import Runner
from spilld.scheduler.prefill_budget import PrefillBudget
from spilld.server.server import Server
from spilld.sessions.journal import JOURNAL_TABLES, Journal
from spilld.sessions.store import SESSIONS_TABLE, SessionStore
from spilld.sessions.transfers import Transfers
from spilld.transport.descriptors import raise_limit

from .errors import (
    BudgetError,
    DeviceUnusable,
    InternalError,
    ModelError,
    StateFolderError,
    UnsupportedModel,
)

log = logging.getLogger(__name__)

COMPILING = "compiling kernels, the first time only"

STATE_SCHEMA = 3
"""Version of the schema of the database of sessions and requests."""

GPU_HEAD_DIM = 256
"""The largest head that the kernels of a GPU are compiled for."""

STAGING_BUFFERS = 16
"""Extents on their way from disk or being attended to: how far reads run ahead."""

READERS = 4
"""Threads that read: a disk reaches its full rate only with several reads at a time."""

LEAST_TRANSFERS = 64 << 20
"""Bytes that transfers of archives may take without a disk budget: tokens need room, too."""


def serve(config: Config, again: Callable[[], Config] | None = None) -> None:
    """Run the daemon until it is stopped.

    Args:
        config: The settings.
        again: Reads the settings again, on SIGHUP.

    Raises:
        ConfigError: The daemon cannot start with these settings.
        InternalError: The engine has stopped computing: the device is lost, or no step succeeds.
    """
    raise_limit()
    use_threads(config.threads)
    metrics = Metrics()
    with (
        Server(
            config.listen,
            drain_seconds=config.drain_seconds,
            open_to_group=config.open_to_group,
            on_failed=metrics.failed,
            keys=config.keys,
            max_open=config.max_open,
            max_rate=config.max_rate,
            max_connections=config.max_connections,
        ) as server,
        metrics.served(config.metrics),
    ):
        startup = Startup(server.notifier)
        startup.step(f"loading {config.model}")
        model = load_model(config, startup.step)
        startup.phase("preparing kernels, which are compiled the first time")
        layouts = record_layouts(config, model.geometry)
        heads = [layer.heads for layer in model.geometry.layers]
        for layout, count in dict.fromkeys(zip(layouts, heads, strict=True)):
            prepare(layout, count, config.cache, model.forms, startup.parts(COMPILING))
        service = EngineService(
            lambda post: build_engine(config, model, post, metrics=metrics),
            server.post,
            welcome(config, model),
            config.max_queue,
            server.stop,
        )
        startup.phase("warming up")
        service.warm_up()
        metrics.follow(service.stats, service.welcome())
        service.start()

        def apply(changed: Config) -> None:
            server.drain_seconds = changed.drain_seconds
            server.limits.max_open, server.limits.max_rate = changed.max_open, changed.max_rate
            service.adjust(changed)

        startup.ready(
            service.welcome(), service.longest, service.stats(), server.address, keyed=config.keys is not None
        )
        server.run(service, Reload(config, again, apply) if again else None)
        if service.lost is not None:
            raise InternalError(f"{service.lost}; the log says more")


def use_threads(count: int | None) -> None:
    """Set how many threads torch and the kernels have; None: one for each core."""
    threads.use(count)
    if count is not None:
        torch.set_num_threads(count)


def load_model(config: Config, tell: Callable[[str], None] = log.info) -> Model:
    """Load the configured model, and convert it first if need be.

    Args:
        config: The settings.
        tell: Called with lines of progress of a conversion.

    Raises:
        ModelError: The model cannot be found, read or served.
        DeviceUnusable: The device cannot take the weights.
        UnsupportedModel: The device does not compute such a model.
    """
    device, missing = place(config)
    if missing:
        log.warning(missing)
    try:
        folder = resolve(config.model, config.cache, config.dtype, tell)
        identity = identify(config.model, config.cache)
    except OSError as error:
        raise ModelError(f"the model cannot be read: {error}; may the daemon's user read it?") from error
    return load(
        folder,
        config.dtype,
        name=config.model,
        max_context=config.max_context,
        cache=config.cache,
        weights=config.weights,
        device=device,
        identity=identity,
        check=partial(_check_for_gpu, config.model) if config.device == "cuda" else lambda _: None,
    )


def _check_for_gpu(name: str, geometry: Geometry) -> None:
    others = {
        "layers with a recurrent state": bool(geometry.states),
        "layers whose heads differ in size": len(geometry.every_sizes) > 1,
        f"heads of more than {GPU_HEAD_DIM}": max(layer.head_dim for layer in geometry.layers) > GPU_HEAD_DIM,
    }
    if found := [what for what, there in others.items() if there]:
        raise UnsupportedModel(
            f'{name} has {" and ".join(found)}, which device = "cuda" does not compute yet: serve it with '
            'device = "cpu"'
        )


def welcome(config: Config, model: Model) -> Welcome:
    """Return what the daemon tells a client that says hello."""
    return Welcome(
        request_id="",
        version=version("spilld"),
        model=model.name,
        dtype=config.dtype,
        format=config.format,
        formats=(config.format,),
        max_context=config.max_context or model.geometry.max_positions,
        chat=model.tokenizer.has_template,
    )


def build_engine(
    config: Config,
    model: Model,
    post: Post,
    planner: Planner = residency.plan,
    metrics: Metrics | None = None,
    tier: Tier | None = None,
) -> Engine:
    """Build the tiers within their budgets, and the engine over them.

    Args:
        config: The settings.
        model: The model that is served.
        post: Sends a reply to a client.
        planner: Decides which blocks leave host memory.
        metrics: Observes durations; None for metrics of the engine's own.
        tier: Builds the device tier, in place of the configured one.

    Raises:
        BudgetError: A budget is too small, or host memory is refused.
        StateFolderError: The state folder cannot be used.
        DeviceUnusable: The device cannot be used.
    """
    metrics = metrics or Metrics()
    with ExitStack() as unless_made:
        try:
            config.state.mkdir(mode=0o700, parents=True, exist_ok=True)
            store = build_store(config, model, planner, metrics)
            unless_made.callback(store.close)
            database = _state_database(config.state / "sessions.sqlite")
            unless_made.callback(database.close)
            quota = max(config.disk_budget, LEAST_TRANSFERS)
            transfers = Transfers(config.state / "transfers", quota, config.disk_floor)
        except (BudgetTooSmall, ValueError) as error:
            raise BudgetError(f"{error}; raise it") from error
        except MemoryRefused as error:
            raise BudgetError(f"{error}; lower host_budget") from error
        except (FolderInUse, FolderUnusable, OSError) as error:
            raise StateFolderError(f"{error}; name another folder with `state`") from error
        chunk_tokens = max(config.chunk_tokens, model.geometry.grid)
        windows, attention = _device_tier(tier or TIERS[config.device], config, store, model.geometry)
        unless_made.callback(attention.close)
        engine = Engine(
            model,
            windows,
            store,
            Runner(model, attention, store, chunk_tokens),
            SessionStore(database),
            Journal(database),
            transfers,
            PrefillBudget(config.max_gap_ms / 1e3, _balance(model)),
            metrics,
            MemoryWatch(config.memory_floor),
            post,
            max_context=config.max_context or model.geometry.max_positions,
            chunk_tokens=chunk_tokens,
            context_ttl_s=config.context_ttl_s,
            retention_s=config.retention_s,
        )
        unless_made.pop_all()
    return engine


def _balance(model: Model) -> float:
    """Return the position at which a token's attention takes as many operations as its products."""
    geometry = model.geometry
    weights = sum(parameter.numel() for parameter in model.module.model.layers.parameters())
    full = [layer for layer in geometry.layers if layer.sliding_window is None]
    pair = sum(2 * layer.heads * layer.head_dim for layer in full)
    return weights / pair if pair else math.inf


def _state_database(path: Path) -> Database:
    """Open the database of sessions and requests."""
    return Database.open(path, STATE_SCHEMA, SESSIONS_TABLE + JOURNAL_TABLES)


def _device_tier(make: Tier, config: Config, store: Store, geometry: Geometry) -> DeviceTier:
    try:
        return make(config, store, geometry)
    except ValueError as error:
        raise BudgetError(f"{error}; raise it") from error
    except (DeviceError, BuildError) as error:
        raise DeviceUnusable(f'device = "{config.device}": {error}') from error


def record_layouts(config: Config, geometry: Geometry) -> StoreLayout:
    """Return how a block's keys and values are stored, by the configured format and dtype."""
    return geometry.layouts(Format(config.format), Element(config.dtype))


def build_store(config: Config, model: Model, planner: Planner, metrics: Metrics) -> Store:
    """Build the host and disk tiers.

    Raises:
        BudgetTooSmall: A budget is too small.
        MemoryRefused: The system refuses the host memory.
        FolderInUse: Another process uses the folder.
        FolderUnusable: The folder cannot be used.
    """
    geometry = model.geometry
    layouts = record_layouts(config, geometry)
    columns = columns_within(config.host_budget, layouts.record_bytes)
    blocks = run_length(layouts, columns, -(-max(config.chunk_tokens, geometry.grid) // BLOCK))
    slab = HostSlab(config.host_budget, layouts.record_bytes)
    disk = None
    if config.disk_budget:
        tier = DiskTier(
            *(config.state / "kv", config.disk_budget, layouts, model.fingerprint),
            floor_bytes=config.disk_floor,
        )
        mine = [run.identity for run in tier.runs() if run.identity.fingerprint == model.fingerprint]
        stored = [identity.largest_extent for identity in mine]
        states = StateShape.of(geometry, getattr(torch, config.dtype))
        checkpoint = CHECKPOINT_BLOCKS + state_blocks(states, layouts.raw)
        extent = max(largest_extent(layouts, blocks), largest_extent(layouts.raw, checkpoint), *stored)
        cache, rate, daily = RunCache(tier, extent), config.compaction_rate, config.write_budget
        wear = None if daily is None else WriteBudget(daily, tier.index)
        disk = DiskBackend(
            tier,
            cache,
            Spiller(tier, extent, metrics.disk_write.observe),
            Prefetcher(
                *(tier, STAGING_BUFFERS, extent, READERS, config.read_deadline_s), metrics.disk_read.observe
            ),
            Compaction(tier, cache, extent, rate, wear=wear) if rate else None,
            wear,
        )
    return Store(layouts, slab, blocks, disk, planner)
