"""The extra `engine`: packages that `pip install spilld` leaves out."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from spilld.errors import ConfigError
from spilld.models.frameworks import import_frameworks


@contextmanager
def engine_imports() -> Iterator[None]:
    """Import in this context what needs the extra.

    What is imported stays: the garbage collector ignores these objects, now and later, which saves a second.

    Raises:
        ConfigError: A package is not installed; the error says what to install.
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
    """Check at once, without imports, that the extra is installed.

    Raises:
        ConfigError: It is not; the error says what to install.
    """
    if find_spec("torch") is None:
        raise _missing("torch")


def _missing(name: str | None) -> ConfigError:
    return ConfigError(
        f"{name} is not installed: this command runs models, which needs the extra `engine`; in a "
        'clone of spilld: `pip install -c constraints.txt ".[engine]"`'
    )
