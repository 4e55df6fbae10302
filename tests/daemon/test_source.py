"""What a loader reads of a model's files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from spilld.errors import CorruptModel
from spilld.models.files.source import SafetensorsFolder, WeightSource


def test_folder_gives_what_its_files_hold_by_name(tmp_path: Path) -> None:
    first, second = torch.randn(3, 4), torch.randn(2, 4, 8).bfloat16()
    save_file({"a": first}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": second}, tmp_path / "model-00002-of-00002.safetensors")
    source: WeightSource = SafetensorsFolder(tmp_path)
    assert source.names == {"a", "b"}
    assert [source.shape(name) for name in "ab"] == [(3, 4), (2, 4, 8)]
    assert torch.equal(source.dense("a"), first)
    assert source.dense("b").dtype == torch.bfloat16
    assert torch.equal(source.dense("b"), second)
    assert source.packed("a") is None


def test_folder_with_a_file_cut_off_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(64)}, whole := tmp_path / "model.safetensors")
    whole.write_bytes(whole.read_bytes()[:-4])
    with pytest.raises(CorruptModel, match="header says"):
        SafetensorsFolder(tmp_path)
