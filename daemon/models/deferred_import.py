"""Packages whose `__init__` runs when one of its names is used, not when a submodule is imported.

`importlib.util.LazyLoader` does not serve: importing a submodule reads the parent's `__path__`, at which it
loads the parent.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from types import ModuleType
from typing import Any

_lock = threading.RLock()


class DeferredPackage(ModuleType):
    """Stands in `sys.modules` for a package that has not run. Its submodules can be imported."""

    _ran = False

    def __getattr__(self, name: str) -> Any:
        """Run the package for a name that is neither known nor a submodule."""
        if name.startswith("__"):  # the import system and `inspect` look for these on every module
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if not self._ran and (submodule := _submodule(self.__name__, name)) is not None:
            return submodule
        with _lock:
            if not self._ran:
                self._ran = True
                assert self.__spec__ is not None
                assert self.__spec__.loader is not None
                self.__spec__.loader.exec_module(self)
        current = sys.modules[self.__name__]  # a package may replace itself while it runs
        if current is not self:
            return getattr(current, name)
        if name in vars(self):
            return vars(self)[name]
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


def defer(name: str, **known: object) -> None:
    """Defer running a package that is not imported yet.

    Args:
        name: The package's full name; its parent is imported.
        known: Attributes that it has before it has run, as it will have them then.

    Raises:
        ModuleNotFoundError: There is no such package.
    """
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    package = importlib.util.module_from_spec(spec)
    package.__class__ = DeferredPackage
    vars(package).update(known)
    sys.modules[name] = package
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, package)


def restore(name: str) -> None:
    """Make the next import of a deferred package an ordinary one, unless it has run.

    This is for a package whose submodules depend on the order in which its `__init__` imports them.
    """
    package = sys.modules[name]
    if isinstance(package, DeferredPackage) and not package._ran:
        del sys.modules[name]
        parent, _, child = name.rpartition(".")
        if parent:
            delattr(sys.modules[parent], child)


def _submodule(package: str, name: str) -> ModuleType | None:
    full_name = f"{package}.{name}"
    try:
        return importlib.import_module(full_name)
    except ModuleNotFoundError as error:
        if error.name != full_name:
            raise
        return None
