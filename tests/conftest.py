"""Models that several test files share. They are converted once per machine, not once per run."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

import spilld.offload.kernels.kernel_cache  # noqa: F401 (of whatever compiles first)
from spilld.models.catalog import default_cache, resolve

gc.disable()  # while tests are imported: what that makes stays, and looking through it takes long


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def cache_folder() -> Path:
    """SPILLD_TEST_CACHE, or the cache that a daemon of this user has."""
    return Path(os.environ.get("SPILLD_TEST_CACHE") or default_cache())


@pytest.fixture(scope="session")
def smollm2_float32(cache_folder: Path) -> Path:
    return resolve("smollm2-135m", cache_folder, "float32")


@pytest.fixture(scope="session")
def smollm2_bfloat16(cache_folder: Path) -> Path:
    return resolve("smollm2-135m", cache_folder, "bfloat16")


@pytest.fixture(scope="session")
def gemma3_float32(cache_folder: Path) -> Path:
    return resolve("gemma3-270m", cache_folder, "float32")
