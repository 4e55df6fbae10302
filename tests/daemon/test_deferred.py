"""A deferred package runs when it is needed, once, and is then what it would have been."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from spilld.models.deferred_import import defer, restore

RUNS = 'RUNS = globals().get("RUNS", 0) + 1\nvalue = "run"\n'
REPLACES = """
import sys, types
replacement = types.ModuleType(__name__)
replacement.value = "replaced"
sys.modules[__name__] = replacement
"""


@pytest.fixture
def package(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of an importable package with a submodule, whose code the test gives."""
    name = "deferred_for_a_test"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text(request.param)
    (tmp_path / name / "part.py").write_text("value = 'of the part'\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    for loaded in [loaded for loaded in sys.modules if loaded.partition(".")[0] == name]:
        del sys.modules[loaded]


def deferred(name: str, **known: object) -> ModuleType:
    defer(name, **known)
    return sys.modules[name]


@pytest.mark.parametrize("package", [RUNS], indirect=True)
def test_submodules_do_not_run_it(package: str) -> None:
    module = deferred(package)
    __import__(f"{package}.part")
    assert module.part.value == "of the part"
    assert "value" not in vars(module)


@pytest.mark.parametrize("package", [RUNS], indirect=True)
def test_a_submodule_is_imported_when_it_is_asked_for(package: str) -> None:
    module = deferred(package)
    assert module.part.value == "of the part"
    assert "value" not in vars(module)


@pytest.mark.parametrize("package", [RUNS], indirect=True)
def test_a_name_runs_it_once(package: str) -> None:
    module = deferred(package, known="before")
    assert module.known == "before"
    assert "value" not in vars(module)
    assert module.value == "run"
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        _ = module.absent
    assert module.RUNS == 1


@pytest.mark.parametrize("package", [REPLACES], indirect=True)
def test_one_that_replaces_itself(package: str) -> None:
    module = deferred(package)
    assert module.value == "replaced"
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        _ = module.absent


@pytest.mark.parametrize("package", ["import absent_from_here\n"], indirect=True)
def test_what_it_raises_comes_out(package: str) -> None:
    module = deferred(package)
    with pytest.raises(ModuleNotFoundError, match="absent_from_here"):
        _ = module.value


@pytest.mark.parametrize("package", [RUNS], indirect=True)
def test_one_that_is_restored(package: str) -> None:
    module = deferred(package)
    restore(package)
    assert __import__(package) is not module
    assert __import__(package).value == "run"


@pytest.mark.parametrize("package", [RUNS], indirect=True)
def test_one_that_has_run_stays(package: str) -> None:
    module = deferred(package)
    assert module.value == "run"
    restore(package)
    assert __import__(package) is module


def test_a_package_that_is_not_there() -> None:
    with pytest.raises(ModuleNotFoundError, match="nowhere_at_all"):
        defer("nowhere_at_all")


def test_frameworks_are_whole_when_they_are_needed() -> None:
    """What was put off works as if it had not been."""
    script = """
from spilld.models.frameworks import import_frameworks
import_frameworks()
import sys, torch
assert "torch._dynamo.eval_frame" not in sys.modules
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2)).tolist() == [2, 2]
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM
config = LlamaConfig(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8
)
assert type(AutoModelForCausalLM.from_config(config)) is LlamaForCausalLM
assert transformers.LlamaForCausalLM is LlamaForCausalLM
"""
    subprocess.run([sys.executable, "-c", script], check=True)
