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
from typing import Any

from spilld.errors import CorruptModel, ModelError, UnsupportedModel
from spilld.models.files.folder import read_config
from spilld.models.files.weights import model_files, read_weight_files, used_files
from spilld.models.gguf.header import GgufHeader, read_header
from spilld.models.gguf.metadata import check_config, check_header, complete
from spilld.models.quantised.config import METHODS, QUANTISATION_FILES, Scheme, plain_config, read_scheme

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
    header = read_header(gguf)
    check_header(header, gguf.name)
    from spilld.models.gguf.library_patches import counted, parsed_once

    with parsed_once(), counted(_say):
        _load_and_save(gguf, header, target, dtype)


def _load_and_save(gguf: Path, header: GgufHeader, target: Path, dtype: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from .model import LOADING_ERRORS

    _say(f"reading {gguf.name} ({gguf.stat().st_size >> 20} MiB) as {dtype}")
    where: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(gguf.parent, **where)
        complete(config, header, gguf.name)
        check_config(config, header, gguf.name)
        module, report = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            config=config,
            dtype=getattr(torch, dtype),
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
            **where,
        )
    except LOADING_ERRORS as error:
        raise CorruptModel(f"{gguf.name} cannot be loaded: {error}") from error
    _check_complete(gguf.name, module, report, header)
    module.generation_config.eos_token_id = _end_ids(module.config.eos_token_id, header)
    module.save_pretrained(target)
    if dtype == "bfloat16":
        _pack(module, gguf, target)
    del module
    _say("reading its tokenizer")
    AutoTokenizer.from_pretrained(gguf.parent, **where).save_pretrained(target)


def _pack(module: Any, gguf: Path, target: Path) -> None:
    from spilld.models.packed.packing import WEIGHTS, pack_gguf

    try:
        pack_gguf(module, gguf, target / WEIGHTS)
    except UnsupportedModel as error:
        _say(f"decode steps will read bfloat16: {error.message}")


def _check_complete(name: str, module: Any, report: dict[str, Any], header: GgufHeader) -> None:
    if missing := sorted(report["missing_keys"]):
        raise CorruptModel(f"{name} lacks {len(missing)} tensors, the first is {missing[0]}")
    parameters = sum(1 for _ in module.parameters())
    if parameters != len(header.tensors):
        raise UnsupportedModel(
            f"{name} has {len(header.tensors)} tensors where its family has {parameters}; "
            "it would not be the same model"
        )
    check_config(module.config, header, name)


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
    if len(parts) == 1:
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
