"""The demo as a user runs it: the pass key is found twice with most of the KV on disk, within its memory.

A minute and a half, alone: `.ci/run` runs it after the suite.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_main_job(smollm2_bfloat16: Path) -> None:
    assert smollm2_bfloat16.is_dir(), "converted before the clock runs"
    command = [sys.executable, "-m", "spilld", "demo", "--json"]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr[-2000:]
    outcome = json.loads(shown.stdout.splitlines()[-1])
    kv_bytes = outcome["kv_bytes"]
    total = sum(kv_bytes.values())
    assert outcome["needle_found"] is True
    assert outcome["context_tokens"] >= 7500
    assert kv_bytes["device"] <= 0.20 * total
    assert kv_bytes["host"] <= 0.25 * total
    assert kv_bytes["disk"] >= 0.55 * total
    assert outcome["disk_read_bytes"] > kv_bytes["disk"]
    assert outcome["peak_rss_bytes"] <= outcome["rss_bound_bytes"]
    assert outcome["matches_transformers"] is None
