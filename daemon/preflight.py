"""What can be said against a configuration before seconds go by with imports and a model."""

from __future__ import annotations

from spilld.offload.size import size

from .config import Config
from .errors import BudgetError
from .memory import physical_bytes


def check(config: Config) -> None:
    """Raises the ConfigError that a start would end in."""
    _check_memory(config.host_budget, physical_bytes())


def _check_memory(host_budget: int, physical: int | None) -> None:
    if physical is not None and host_budget > physical:
        raise BudgetError(
            f"host_budget is {size(host_budget)}, this machine has {size(physical)} of memory: lower it"
        )
