"""Checks of a configuration before imports and loading a model take seconds."""

from __future__ import annotations

import logging
import shutil
from contextlib import suppress

from spilld.config.config import Config
from spilld.config.named_models import sources_of
from spilld.cuda_ext.compile.build import DriverMissing, find_driver
from spilld.errors import BudgetError, DeviceUnusable
from spilld.models.files.folder import check_folder
from spilld.monitoring.memory import available_bytes, physical_bytes
from spilld.offload.size import size

from .model_size import check_fits

log = logging.getLogger(__name__)


def check(config: Config) -> None:
    """Check a configuration; log what will be less than configured.

    Raises:
        ConfigError: The daemon could not start with it.
    """
    with suppress(OSError):  # what cannot be read is reported when it is loaded
        source = sources_of(config.model)[0]
        if source.is_dir():
            check_folder(source)
    if config.device == "cuda":
        try:
            find_driver()
        except DriverMissing as error:
            raise DeviceUnusable(f'device = "cuda": {error}') from error
    _check_memory(config.host_budget, physical_bytes())
    with suppress(OSError):
        check_fits(config, available_bytes())
    with suppress(OSError):
        _compare_disk(config)


def _check_memory(host_budget: int, physical: int | None) -> None:
    if physical is not None and host_budget > physical:
        raise BudgetError(
            f"host_budget is {size(host_budget)}, this machine has {size(physical)} of memory: lower it"
        )


def _compare_disk(config: Config) -> None:
    """Warn if the disk is too small; no more, because there may be more room later."""
    folder = next(path for path in (config.state, *config.state.parents) if path.is_dir())
    free = shutil.disk_usage(folder).free
    stored = sum(file.stat().st_size for file in (config.state / "kv").glob("*.segment"))
    if config.disk_budget > stored + max(0, free - config.disk_floor):
        log.warning(
            "disk_budget is %s, the file system of %s has %s free, of which disk_floor keeps %s: KV that has "
            "no room there is evicted, unless more becomes free",
            *(size(config.disk_budget), config.state, size(free), size(config.disk_floor)),
        )
