"""The package from outside: what it offers, and what a daemon of it imports."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import spilld
from spilld import Client
from spilld.demo.spawn import Process, spawned

from .forked import spawned as forked
from .tiny_models import build

HEAVY = ["torch", "numpy", "numba", "transformers", "xxhash", "prometheus_client"]


def test_the_package_offers_the_client_and_loads_it_when_it_is_used() -> None:
    script = (
        "import json, sys; import spilld as d; before = 'zmq' in sys.modules; listed = dir(d);"
        "from spilld import Client, AsyncClient, Token; from spilld import *;"
        "hidden = sorted(set(d.__all__) - set(listed));"
        f"print(json.dumps([before, hidden, [m for m in {HEAVY} if m in sys.modules]]))"
    )
    out = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert json.loads(out) == [False, [], []]


def test_the_package_has_no_other_names() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Clients'"):
        _ = spilld.Clients  # type: ignore[attr-defined]
    assert all(getattr(spilld, name).__name__ == name for name in spilld.__all__)


SERVE = """
import json, sys
from pathlib import Path
from spilld.__main__ import main

status = main(sys.argv[2:])
Path(sys.argv[1]).write_text(json.dumps(list(sys.modules)))
sys.exit(status)
"""
UNUSED = {
    "gguf",
    "mpmath",
    "onnx",
    "scipy",
    "sympy",
    "torch._dynamo.eval_frame",
    "torch._inductor",
    "torch.distributed.tensor",
    "torch.fx.experimental.symbolic_shapes",
    "transformers.pipelines",
    "transformers.trainer",
}
"""What serving loads no part of. `torch._dynamo` is there, deferred: its submodules are what takes time."""


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_daemon_imports_what_it_uses(family: str, tmp_path: Path) -> None:
    """From its start, not the first with this model, to the end of a generation; of transformers the one
    family that it serves."""
    listed = tmp_path / "modules.json"

    def start(arguments: Sequence[str], log: Path) -> Process:
        with log.open("wb") as output:
            command = [sys.executable, "-c", SERVE, str(listed), *arguments]
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)

    settings = {"model": build(family, tmp_path / "model"), "dtype": "float32", "threads": 1}
    with forked(settings):
        pass
    with spawned(settings, start=start) as daemon:
        with Client(daemon.address) as client:
            generation = client.generate([5, 6, 7], max_tokens=3, ignore_eos=True)
            generation.text()
            assert generation.result.usage.generated_tokens == 3
        daemon.process.send_signal(signal.SIGTERM)
        assert daemon.process.wait(60) == 0, daemon.log.read_text()
    loaded = set(json.loads(listed.read_text()))
    assert {f"transformers.models.{family}.modeling_{family}", "torch", "numba"} <= loaded
    unused = {name for name in loaded if any(f"{name}.".startswith(f"{part}.") for part in UNUSED)}
    assert unused == set()
    families = {match[1] for name in loaded if (match := re.match(r"transformers\.models\.(\w+)", name))}
    assert len(families) <= 4, "its own, and what that imports"
