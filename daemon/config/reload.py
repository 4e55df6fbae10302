"""Settings that are read again while the daemon runs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import fields, replace

from spilld.errors import ConfigError

from .config import Config

log = logging.getLogger(__name__)

SAFE = (
    "max_gap_ms",
    "max_queue",
    "max_open",
    "max_rate",
    "drain_seconds",
    "read_deadline_s",
    "context_ttl_s",
    "retention_s",
)
"""What a running daemon takes. The others size what it holds, or say what the model and its KV are."""


class Reload:
    """Reads the configuration again when it is called.

    What changed is applied if it is in SAFE, and named in the log. A configuration that cannot be read
    changes nothing; the error is logged.
    """

    def __init__(self, config: Config, read: Callable[[], Config], apply: Callable[[Config], None]) -> None:
        """Prepare to reload.

        Args:
            config: What the daemon runs with.
            read: Reads the configuration; raises ConfigError.
            apply: Called with the running configuration, in which settings of SAFE have their new values.
        """
        self._config = config
        self._read = read
        self._apply = apply

    def __call__(self) -> None:
        """Read the settings again and apply what may change."""
        try:
            wanted = self._read()
        except ConfigError as error:
            log.error("no setting is changed: %s", error.message)
            return
        for name in (setting.name for setting in fields(Config)):
            before, after = getattr(self._config, name), getattr(wanted, name)
            if before != after and name in SAFE:
                log.info("%s is %s now, no longer %s", name, after, before)
            elif before != after:
                log.warning("%s stays %s: to make it %s, restart the daemon", name, before, after)
        self._config = replace(self._config, **{name: getattr(wanted, name) for name in SAFE})
        self._apply(self._config)
