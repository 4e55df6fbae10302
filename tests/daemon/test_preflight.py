"""What ends a start at once: before torch is imported, and with what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from spilld.__main__ import main
from spilld.cli.model_size import check_fits
from spilld.cli.preflight import check
from spilld.config.config import Config
from spilld.errors import BudgetError
from spilld.monitoring.memory import physical_bytes
from spilld.offload.size import size

SCRIPT = """
import sys
from spilld.__main__ import main
status = main(sys.argv[1:])
assert "torch" not in sys.modules and "numba" not in sys.modules, "too late"
sys.exit(status)
"""


def refusal(tmp_path: Path, *options: str) -> str:
    """What `serve` says last, in a process that has not imported torch when it ends."""
    places = (f"--state={tmp_path}/state", f"--cache={tmp_path}/cache", f"--listen=ipc://{tmp_path}/s")
    command = [sys.executable, "-c", SCRIPT, "serve", *places, *options]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 1, ended.stderr
    assert "Traceback" not in ended.stderr
    return ended.stderr.splitlines()[-1]


def test_more_host_memory_than_there_is(tmp_path: Path) -> None:
    has = physical_bytes()
    assert has is not None
    assert refusal(tmp_path, "--host-budget=900T") == (
        f"spilld: host_budget is 900 TiB, this machine has {size(has)} of memory: lower it"
    )


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    known = "known names are smollm2-135m, gemma3-270m; a .gguf file or a folder"
    for name in ("gpt-17", f"{tmp_path}/none.gguf"):
        assert refusal(tmp_path, f"--model={name}").startswith(f"spilld: there is no model '{name}': {known}")
    assert refusal(tmp_path, f"--model={tmp_path}") == f"spilld: {tmp_path} has no config.json"


def large(folder: Path, **config: object) -> Path:
    """A folder with a matrix of 1 TiB, of which no byte is on disk."""
    folder.mkdir()
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    said = {
        "model_type": "llama",
        "vocab_size": 384,
        "intermediate_size": 96,
        "head_dim": 16,
        **sizes,
        **config,
    }
    (folder / "config.json").write_text(json.dumps(said))
    tensor = {"dtype": "BF16", "shape": [1 << 20, 1 << 19], "data_offsets": [0, 1 << 40]}
    header = json.dumps({"model.embed_tokens.weight": tensor}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (1 << 40))
    return folder


def test_a_model_that_memory_does_not_hold(tmp_path: Path) -> None:
    folder = large(tmp_path / "large")
    assert refusal(tmp_path, f"--model={folder}").startswith(
        f'spilld: {folder} needs 1 TiB for its weights (weights = "bf16", dtype = "bfloat16"), of memory '
    )


def test_what_would_fit_is_said(tmp_path: Path) -> None:
    config = Config(model=str(large(tmp_path / "large")))
    check_fits(config, 1 << 40)
    with pytest.raises(BudgetError, match=r'weights = "int8" takes 544 GiB; weights = "int4" takes 320 GiB'):
        check_fits(config, 600 << 30)
    with pytest.raises(BudgetError, match="no form of this model fits"):
        check_fits(config, 1 << 30)


def test_the_doctor_says_what_a_model_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = large(tmp_path / "large", max_position_embeddings=4096)
    assert main(["doctor", f"--model={folder}"]) in (0, None)
    said = capsys.readouterr().out.splitlines()
    assert 'weights: weights = "int4": 320 GiB, more than is available' in said
    assert "KV: exact: 256 bytes a token, 4096 tokens within the budgets" in said
    assert "KV: k8v4: 120 bytes a token, 4096 tokens within the budgets, as configured" in said


def test_a_gpu_without_a_driver(tmp_path: Path) -> None:
    """Before what the device is to have of the configuration and of packages."""
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("there is a driver here")
    assert refusal(tmp_path, "--device=cuda") == (
        'spilld: device = "cuda": there is no NVIDIA driver (libcuda.so.1) on this machine: install it, or '
        'take device = "cpu"'
    )


def test_an_address_of_no_form_is_told_which_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", "--address=foo", "--wait=0"]) == 1
    assert capsys.readouterr().err.strip().endswith("an address is ipc:///path or tcp://host:port")


def test_help_names_the_models(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "A known name (smollm2-135m, gemma3-270m), a .gguf file, or a Hugging Face folder" in said


def test_a_larger_disk_budget_than_the_disk_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    check(Config(state=tmp_path / "not" / "there", disk_budget=900 << 40))
    (said,) = caplog.messages
    assert said.startswith(f"disk_budget is 900 TiB, the file system of {tmp_path}/not/there has ")
    caplog.clear()
    check(Config(state=tmp_path, disk_budget=1 << 20, disk_floor=0))
    (tmp_path / "kv").mkdir()
    with (tmp_path / "kv" / "00000001.segment").open("wb") as file:
        file.truncate(2 << 40)
    check(Config(state=tmp_path, disk_budget=2 << 40))
    assert not caplog.messages, "what is stored has its room"


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1536, "1.5 KiB"),
        (512 << 20, "512 MiB"),
        (11089920, "10.6 MiB"),
        (1023 << 30, "1023 GiB"),
        (900 << 40, "900 TiB"),
    ],
)
def test_sizes_for_people(nbytes: int, text: str) -> None:
    assert size(nbytes) == text


def test_what_is_needed_at_the_least_is_rounded_up() -> None:
    assert size((10 << 20) + 1, least=True) == "10.1 MiB"
    assert size(10 << 20, least=True) == "10 MiB"
