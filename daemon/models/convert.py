"""Turns a GGUF file, or a model folder of another dtype, into a folder whose weights can be mapped.

`python -m spilld.models.convert --dtype float32 --target FOLDER SOURCE...`: a child process, so that its
peak memory (two copies of the weights) leaves with it. A failure is one JSON line {"code", "message"} on
stdout and exit status 3. The target appears whole, by rename, or not at all; a lock beside it keeps two
daemons from converting twice.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spilld.errors import CorruptModel, ModelError, UnsupportedModel
from spilld.models.files.folder import read_config
from spilld.models.files.weights import model_files, read_weight_files, used_files
from spilld.models.gguf.header import MAGIC, GgufHeader
from spilld.models.gguf.metadata import INSTEAD, config_values
from spilld.models.gguf.split import read_whole
from spilld.models.quantised.config import METHODS, QUANTISATION_FILES, Scheme, plain_config, read_scheme

if TYPE_CHECKING:
    from spilld.models.files.source import WeightSource
    from spilld.models.gguf.weights import GgufWeights

FAILED = 3
"""Exit status of a failure that was reported on stdout."""


def main(arguments: list[str] | None = None) -> int:
    """Convert as the arguments say; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m spilld.models.convert")
    parser.add_argument(
        "sources", type=Path, nargs="+", help="a model folder, a .gguf file, or its parts in order"
    )
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    options = parser.parse_args(arguments)
    try:
        convert(options.sources, options.target, options.dtype)
    except ModelError as error:
        print(json.dumps({"code": error.code, "message": error.message}))
        return FAILED
    return 0


def convert(sources: list[Path], target: Path, dtype: str) -> None:
    """Write `target` from one model folder, one GGUF file, or the byte-wise parts of one GGUF file.

    Nothing is done if `target` exists once the lock is taken. On any error `target` is absent.

    Args:
        sources: The folder, the file, or the parts in order.
        target: The folder to write.
        dtype: "float32" or "bfloat16".

    Raises:
        CorruptModel: The source is damaged.
        UnsupportedModel: It is of a kind that is not served.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(target.with_name(target.name + ".lock")):
        if target.exists():
            return
        for left_over in target.parent.glob(f"{target.name}.tmp-*"):
            shutil.rmtree(left_over)
        building = target.with_name(f"{target.name}.tmp-{os.getpid()}")
        building.mkdir()
        try:
            if sources[0].is_dir():
                _from_folder(sources[0], building, dtype)
            else:
                with _one_file(sources, building) as gguf:
                    _from_gguf(gguf, building, dtype)
            _sync(building)
            building.rename(target)
        finally:
            shutil.rmtree(building, ignore_errors=True)


def _from_gguf(gguf: Path, target: Path, dtype: str) -> None:
    header = read_whole(gguf)
    values = config_values(header, gguf.name)
    import torch
    from transformers import AutoTokenizer

    from spilld.models.gguf.library_patches import config_known
    from spilld.models.gguf.weights import GgufWeights, rope_factors

    from .model import LOADING_ERRORS

    _say(f"reading {gguf.name} ({gguf.stat().st_size >> 20} MiB) as {dtype}")
    weights = GgufWeights(header, gguf.name)
    values = rope_factors(values, weights)
    try:
        module = _skeleton(values)
        _fill(module, weights, getattr(torch, dtype), gguf.name)
        module.generation_config.eos_token_id = _end_ids(values["eos_token_id"], header)
        module.save_pretrained(target)
        if dtype == "bfloat16":
            _pack(module, weights, target)
        del module
        _say("reading its tokenizer")
        with config_known(values):
            where: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
            AutoTokenizer.from_pretrained(gguf.parent, **where).save_pretrained(target)
    except LOADING_ERRORS as error:
        raise CorruptModel(f"{gguf.name} cannot be loaded: {error}") from error


def _skeleton(values: dict[str, Any]) -> Any:
    """Return the module without weights, on torch's meta device."""
    import torch
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from .model import model_class

    family = values["model_type"]
    config = CONFIG_MAPPING[family](**{key: value for key, value in values.items() if key != "model_type"})
    config.architectures = [model_class(family).__name__]
    with torch.device("meta"):
        return model_class(family)(config).eval()


def _fill(module: Any, weights: WeightSource, dtype: Any, name: str) -> None:
    """Give a module without weights those of a file, each in `dtype`.

    Raises:
        CorruptModel: A tensor is missing or of another shape.
        UnsupportedModel: There are tensors that the module does not have.
    """
    import torch

    module.tie_weights()
    parameters = {key: value.shape for key, value in module.named_parameters()}
    if missing := sorted(parameters.keys() - weights.names):
        raise CorruptModel(f"{name} lacks {len(missing)} tensors, the first is {missing[0]}")
    if unknown := sorted(weights.names - parameters.keys()):
        raise UnsupportedModel(f"{name} has {unknown[0]}, which its family has not; {INSTEAD}")
    for key, shape in parameters.items():
        if tuple(shape) != weights.shape(key):
            raise CorruptModel(f"{name}: {key} is {weights.shape(key)} and must be {tuple(shape)}")
        owner, _, attribute = key.rpartition(".")
        filled = torch.nn.Parameter(weights.dense(key).to(dtype), requires_grad=False)
        setattr(module.get_submodule(owner), attribute, filled)
    module.tie_weights()


def _pack(module: Any, weights: GgufWeights, target: Path) -> None:
    from spilld.models.packed.packing import WEIGHTS, pack_gguf

    try:
        pack_gguf(module, weights, target / WEIGHTS)
    except UnsupportedModel as error:
        _say(f"decode steps will read bfloat16: {error.message}")


def _end_ids(eos: int | list[int] | None, header: GgufHeader) -> list[int]:
    """Return all end tokens: GGUF may name an end of turn and one of message beside the end of text."""
    ids = set(eos if isinstance(eos, list) else [] if eos is None else [eos])
    for key in ("eot_token_id", "eom_token_id"):
        if isinstance(value := header.values.get(f"tokenizer.ggml.{key}"), int):
            ids.add(value)
    return sorted(ids)


def _from_folder(source: Path, target: Path, dtype: str) -> None:
    from .model import load_module

    if (scheme := read_scheme(source, read_config(source))) is not None:
        _from_quantised(source, scheme, target, dtype)
        return

    _say(f"casting {source} to {dtype}")
    module = load_module(source, dtype, "eager")
    module.save_pretrained(target)
    _copy_others(source, target)


def _from_quantised(source: Path, scheme: Scheme, target: Path, dtype: str) -> None:
    """Write the weights as numbers, and beside them, for steps, the codes that packed forms keep."""
    import torch

    from spilld.models.packed.packing import WEIGHTS, pack_quantised
    from spilld.models.quantised.dense_copy import write_dense
    from spilld.models.quantised.folder import QuantisedFolder

    from .model import load_module

    _say(f"reading {source}, quantised by {scheme.method}, as {dtype}")
    read_weight_files(source)
    weights = QuantisedFolder(used_files(source), scheme)
    write_dense(weights, getattr(torch, dtype), target / "model.safetensors")
    config = plain_config(read_config(source))
    (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    _copy_others(source, target)
    module = load_module(target, dtype, "eager")
    if dtype == "bfloat16":
        try:
            pack_quantised(module, weights.packed, target / WEIGHTS)
        except UnsupportedModel as error:
            _say(f"decode steps will read bfloat16: {error.message}")
            return
        _say(f"decode steps read what {scheme.method} becomes: {METHODS[scheme.method].becomes}")


def _copy_others(source: Path, target: Path) -> None:
    """Copy the files of a folder that are neither weights nor there already."""
    for file in model_files(source):
        is_weights = file.name.endswith((".safetensors", ".index.json"))
        if not is_weights and file.name not in QUANTISATION_FILES and not (target / file.name).exists():
            shutil.copyfile(file, target / file.name)


@contextmanager
def _one_file(parts: list[Path], beside: Path) -> Iterator[Path]:
    """Join a file's parts, if it was cut bytewise: parts of gguf-split are read where they are."""
    if len(parts) == 1 or _starts_as_gguf(parts[1]):
        yield parts[0]
        return
    joined = beside / (parts[0].stem + ("" if parts[0].stem.endswith(".gguf") else ".gguf"))
    with joined.open("wb") as out:
        for part in parts:
            with part.open("rb") as piece:
                shutil.copyfileobj(piece, out, 1 << 22)
    try:
        yield joined
    finally:
        joined.unlink()


def _starts_as_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"waiting for another process that is converting {path.stem}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sync(folder: Path) -> None:
    """Make every file durable before the rename, so that a power cut leaves no incomplete folder behind."""
    for path in [*folder.iterdir(), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _say(message: str) -> None:
    print(f"spilld: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
