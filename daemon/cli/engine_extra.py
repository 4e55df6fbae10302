"""What `pip install spilld` leaves out: the packages of the engine, an extra."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from spilld.errors import ConfigError
from spilld.models.frameworks import import_frameworks


@contextmanager
def engine_imports() -> Iterator[None]:
    """Import in here what needs them. ConfigError that says what to install where they are not.

    What modules make stays: garbage is not looked for there, now, which would take a second, or later.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        import_frameworks()
        yield
    except ModuleNotFoundError as error:
        if (error.name or "spilld").partition(".")[0] == "spilld":
            raise
        raise _missing(error.name) from error
    finally:
        gc.freeze()
        if collects:
            gc.enable()


def check_engine_installed() -> None:
    """The same ConfigError, at once: nothing is imported."""
    if find_spec("torch") is None:
        raise _missing("torch")


def _missing(name: str | None) -> ConfigError:
    return ConfigError(
        f"{name} is not installed: this command runs models, which needs the extra `engine`; in a "
        'clone of spilld: `pip install -c constraints.txt ".[engine]"`'
    )
