"""Readers of fields: each checks a plain value and gives it its Python type.

A dataclass names the reader of a field in its annotation, `top_k: Annotated[int, Int(0)] = 0`, and `read(cls,
mapping)` builds it. A value that does not fit raises FieldError; the modules that use the readers turn it
into an error of their own.
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar, get_type_hints

T = TypeVar("T")


class FieldError(ValueError):
    """A value does not fit its field: which field, what was given and what is allowed."""

    def __init__(self, name: str, given: object, allowed: str) -> None:
        super().__init__(f"{name} is {reprlib.repr(given)}; allowed: {allowed}")
        self.name = name


class FieldReader(ABC):
    """Reads one field: of a message, a file or a command line."""

    @abstractmethod
    def read(self, value: object, name: str) -> Any:
        """Check a value and convert it to its Python type.

        Args:
            value: The plain value.
            name: What an error calls the field.

        Raises:
            FieldError: The value does not fit the field.
        """


@dataclass(frozen=True)
class Int(FieldReader):
    """A whole number within bounds."""

    low: int
    high: int = 2**63 - 1

    def read(self, value: object, name: str) -> int:
        """See FieldReader.read."""
        if type(value) is not int or not self.low <= value <= self.high:
            raise FieldError(name, value, self.allowed)
        return value

    @property
    def allowed(self) -> str:
        """What is allowed, in words."""
        return f"an integer from {self.low} to {self.high}"


@dataclass(frozen=True)
class Ints(FieldReader):
    """A tuple of integers. Checked at C speed: a prompt may hold a million."""

    each: Int

    def read(self, value: object, name: str) -> tuple[int, ...]:
        """See FieldReader.read."""
        if not isinstance(value, list | tuple):
            raise FieldError(name, value, f"a list; each item {self.each.allowed}")
        if value and (
            set(map(type, value)) != {int} or min(value) < self.each.low or max(value) > self.each.high
        ):
            for index, item in enumerate(value):
                self.each.read(item, f"{name}[{index}]")
        return tuple(value)


@dataclass(frozen=True)
class Real(FieldReader):
    """A finite float (an integer is taken too) between low and high."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False  # low itself is excluded

    def read(self, value: object, name: str) -> float:
        """See FieldReader.read."""
        if type(value) is int or type(value) is float:
            fits = self.low < value if self.above else self.low <= value
            if fits and value <= self.high and math.isfinite(value):
                return float(value)
        edge = "above" if self.above else "from"
        raise FieldError(name, value, f"a finite number {edge} {self.low:g} to {self.high:g}")


@dataclass(frozen=True)
class LogProb(FieldReader):
    """A float; -inf is a probability of zero."""

    def read(self, value: object, name: str) -> float:
        """See FieldReader.read."""
        if (type(value) is int or type(value) is float) and value < math.inf:
            return float(value)
        raise FieldError(name, value, "a number or -inf")


@dataclass(frozen=True)
class Flag(FieldReader):
    """True or false."""

    def read(self, value: object, name: str) -> bool:
        """See FieldReader.read."""
        if not isinstance(value, bool):
            raise FieldError(name, value, "true or false")
        return value


@dataclass(frozen=True)
class Text(FieldReader):
    """A string with a bounded number of characters; `high` None is no bound."""

    low: int = 0
    high: int | None = None

    def read(self, value: object, name: str) -> str:
        """See FieldReader.read."""
        high = math.inf if self.high is None else self.high
        if not isinstance(value, str) or not self.low <= len(value) <= high:
            allowed = "a string" if self.high is None else f"a string of {self.low} to {self.high} characters"
            raise FieldError(name, value, allowed)
        return str(value)


@dataclass(frozen=True)
class Blob(FieldReader):
    """A string of at most `high` bytes."""

    high: int

    def read(self, value: object, name: str) -> bytes:
        """See FieldReader.read."""
        if not isinstance(value, bytes) or len(value) > self.high:
            raise FieldError(name, value, f"at most {self.high} bytes")
        return value


@dataclass(frozen=True)
class OneOf(FieldReader):
    """One of several given strings."""

    values: tuple[str, ...]

    def read(self, value: object, name: str) -> str:
        """See FieldReader.read."""
        if not isinstance(value, str) or value not in self.values:
            raise FieldError(name, value, ", ".join(self.values))
        return str(value)


@dataclass(frozen=True)
class ListOf(FieldReader):
    """A tuple of at most `most` items; `most` None is no bound."""

    each: FieldReader
    most: int | None = None

    def read(self, value: object, name: str) -> tuple[Any, ...]:
        """See FieldReader.read."""
        if not isinstance(value, list | tuple) or (self.most is not None and len(value) > self.most):
            raise FieldError(
                name, value, "a list" + ("" if self.most is None else f" of at most {self.most}")
            )
        return tuple(self.each.read(item, f"{name}[{index}]") for index, item in enumerate(value))


@dataclass(frozen=True)
class TupleOf(FieldReader):
    """A tuple of fixed length."""

    each: tuple[FieldReader, ...]

    def read(self, value: object, name: str) -> tuple[Any, ...]:
        """See FieldReader.read."""
        if not isinstance(value, list | tuple) or len(value) != len(self.each):
            raise FieldError(name, value, f"a list of {len(self.each)}")
        return tuple(
            r.read(item, f"{name}[{i}]") for i, (r, item) in enumerate(zip(self.each, value, strict=True))
        )


@dataclass(frozen=True)
class MapOf(FieldReader):
    """A dict from strings; without `each` the values are any plain data."""

    each: FieldReader | None = None

    def read(self, value: object, name: str) -> dict[str, Any]:
        """See FieldReader.read."""
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise FieldError(name, value, "a map from strings")
        if self.each is None:
            return dict(value)
        return {key: self.each.read(item, f"{name}.{key}") for key, item in value.items()}


@dataclass(frozen=True)
class Maybe(FieldReader):
    """None, or what the other reader takes."""

    reader: FieldReader

    def read(self, value: object, name: str) -> Any:
        """See FieldReader.read."""
        return None if value is None else self.reader.read(value, name)


@dataclass(frozen=True)
class Struct(FieldReader):
    """A nested dataclass, as a map of its fields or as an instance (whose fields are checked again)."""

    cls: type

    def read(self, value: object, name: str) -> Any:
        """See FieldReader.read."""
        if isinstance(value, self.cls):
            return read(self.cls, vars(value), f"{name}.")
        if not isinstance(value, Mapping):
            raise FieldError(name, value, "a map of " + ", ".join(readers(self.cls)))
        return read(self.cls, value, f"{name}.")


@cache
def readers(cls: type) -> dict[str, FieldReader]:
    """Return the reader of each field of a dataclass, in the order of its fields."""
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name].__metadata__[0] for field in dataclasses.fields(cls)}


@cache
def required(cls: type) -> Sequence[str]:
    """Return the names of the fields without a default."""
    missing = dataclasses.MISSING
    fields = dataclasses.fields(cls)
    return [f.name for f in fields if f.default is missing and f.default_factory is missing]


def read(cls: type[T], values: Mapping[str, object], path: str = "") -> T:
    """Build a dataclass from plain values; unknown keys are ignored.

    Args:
        cls: The dataclass.
        values: Plain values, by field.
        path: What an error puts in front of a field's name.

    Raises:
        FieldError: A value does not fit, or a field without a default is missing.
    """
    kind: type = cls
    for name in required(kind):
        if name not in values:
            raise FieldError(path + name, None, "it must be given")
    known = readers(kind)
    return cls(**{name: known[name].read(values[name], path + name) for name in known if name in values})
