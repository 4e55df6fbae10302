"""From the name an operator gives to a folder that can be loaded: known names, GGUF files, model folders."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from spilld.config.named_models import PACKAGED, sources_of
from spilld.errors import ConfigError, CorruptModel, ModelError, error_for
from spilld.models.files.digest import digest, is_noted
from spilld.models.files.folder import check_folder
from spilld.models.files.weights import model_files, read_weight_files, tokenizer_files
from spilld.models.gguf.header import read_header
from spilld.models.gguf.metadata import config_values
from spilld.models.gguf.split import parts_of, read_whole

from .child_output import lines_to
from .convert import FAILED

CONVERSION = 6
"""Part of a converted folder's name: raise it when convert.py turns the same source into something else."""


_IN_PLACE = 7 / 8
"""Share of a folder's weights that can be mapped, from which on the rest is better cast into memory at each
start: what is cast cannot leave memory while the daemon runs."""


def default_cache() -> Path:
    """Return $XDG_CACHE_HOME/spilld, by default ~/.cache/spilld."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spilld"


def _print(line: str) -> None:
    print(f"spilld: {line}", file=sys.stderr, flush=True)


def resolve(name: str, cache: Path, dtype: str, report: Callable[[str], None] = _print) -> Path:
    """Return the folder to load a model from, after converting it if that is needed.

    A folder that fits, but for few tensors that are cast whenever it is loaded, is used in place. What is not
    stored in `dtype` otherwise, or is quantised, is converted once into `cache/models`, which takes up to
    minutes.

    Args:
        name: A known name, a .gguf file, or a folder with config.json and safetensors.
        cache: The cache folder.
        dtype: "float32" or "bfloat16".
        report: Called with lines of progress; by default they are printed to stderr.

    Raises:
        UnknownModel: There is no such model.
        CorruptModel: Its files are damaged.
        UnsupportedModel: It is of a kind that is not served.
        ConfigError: The cache cannot be written.
    """
    sources = _files_of(name)
    if sources[0].is_dir():
        quantised = check_folder(sources[0]) is not None
        if read_weight_files(sources[0]).share(dtype) >= _IN_PLACE and not quantised:
            return sources[0]
    return _converted(_short(name, sources), sources, cache, dtype, report)


def identify(name: str, cache: Path) -> bytes:
    """Return 16 bytes that identify weights and tokenizer, the same in every dtype.

    Tokens have a meaning only for the model with this identity; KV is tied to more (Model.fingerprint).

    Raises:
        SpilldError: As in `resolve`.
    """
    sources = _files_of(name)
    if not sources[0].is_dir():
        return digest(sources, cache)
    folder = sources[0]
    return digest([*read_weight_files(folder).files, *tokenizer_files(folder)], cache)


def _files_of(name: str) -> list[Path]:
    """Return the files of a model in order; of a GGUF file in parts all, where only the first is named."""
    sources = sources_of(name)
    if len(sources) > 1 or sources[0].is_dir():
        return sources
    parts = parts_of(sources[0], read_header(sources[0]))
    if missing := [part for part in parts if not part.is_file()]:
        raise CorruptModel(f"{name} has {len(parts)} parts, but {missing[0]} is missing")
    return parts


def _short(name: str, sources: list[Path]) -> str:
    """Return what a converted model is called."""
    if name in PACKAGED:
        return name
    return sources[0].name if sources[0].is_dir() else sources[0].stem


def parameters(name: str) -> int | None:
    """Return how many parameters a model has, from headers alone; None for a GGUF file.

    Raises:
        CorruptModel: A weight file is damaged.
        UnsupportedModel: The weights are in a form that is not read.
    """
    path = Path(name).expanduser()
    return read_weight_files(path).parameters if name not in PACKAGED and path.is_dir() else None


def _converted(
    name: str, sources: list[Path], cache: Path, dtype: str, report: Callable[[str], None]
) -> Path:
    files = model_files(sources[0]) if sources[0].is_dir() else sources
    if name not in PACKAGED and sources[0].is_file() and not is_noted(sources[0], cache):
        config_values(read_whole(sources[0]), name)  # refused at once, before all of it is read
    key = digest(files, cache).hex()[:12]
    target = cache / "models" / f"{re.sub('[^A-Za-z0-9._-]', '_', name)}-{dtype}-{key}-v{CONVERSION}"
    if not target.is_dir():
        _make_room(target.parent)
        _run_converter(name, sources, target, dtype, report)
    return target


def _make_room(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the cache folder {folder} cannot be written: {error}") from error


def _run_converter(
    name: str, sources: list[Path], target: Path, dtype: str, report: Callable[[str], None]
) -> None:
    report(f"preparing {name} in {dtype}, once, in {target}")
    with lines_to(lambda line: report(line.removeprefix("spilld: "))) as errors:
        done = subprocess.run(
            [sys.executable, "-m", "spilld.models.convert", "--dtype", dtype, "--target", target, *sources],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"},
            check=False,
        )
    if done.returncode == FAILED:
        reported = json.loads(done.stdout.splitlines()[-1])
        raise error_for(reported["code"], reported["message"])
    if done.returncode != 0 or not target.is_dir():
        raise ModelError(
            f"converting {name} failed with exit status {done.returncode} (-9: out of memory?); "
            "its last words are above"
        )
