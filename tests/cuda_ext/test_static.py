"""What can be said of machine code without a GPU, on every architecture that kernels are compiled for."""

from __future__ import annotations

from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from spilld.cuda_ext.compile import variant
from spilld.cuda_ext.compile.build import ARCHITECTURES, path_of
from spilld.cuda_ext.compile.variant import MOST_SHARED, Variant
from spilld.offload.record import Format

from .cases import cases
from .cubins import instructions, resources
from .instructions import per_byte
from .numbers import Number, integers, layout_of

BUDGETS = {"merge": 72, "rotate": 48, "seal": 64, "dequantise": 64}
"""Registers of a thread. Of attention: 8 warps of 32 threads fit into an SM's 65,536 at 255 each."""
ATTENTION_BUDGETS = {64: 224, 80: 224, 96: 224, 128: 224, 256: 255}

MOST_PER_BYTE = {(16, 16): 0.15, (8, 8): 0.35, (8, 4): 0.5, (4, 4): 0.65}
"""Instructions of a warp of attention for a byte of KV, an estimate; most for head_dim 64."""


def budget(made: Variant) -> int:
    return BUDGETS.get(made.name) or ATTENTION_BUDGETS[dict(made.defines)["HEAD_DIM"]]


def title(made: Variant) -> str:
    given = dict(made.defines)
    words = [
        f"{short}{given[name]}"
        for short, name in (("d", "HEAD_DIM"), ("k", "K_BITS"), ("v", "V_BITS"))
        if name in given
    ]
    return "-".join([made.name, *words, *(["f16"] if given.get("FLOAT16") else [])])


ALWAYS = {
    variant.attend_records(integers(layout_of(Format.K8V4, Number.BFLOAT16, 128))),
    variant.attend_records(integers(layout_of(Format.INT4, Number.BFLOAT16, 256))),
    variant.attend_records(integers(layout_of(Format.EXACT, Number.BFLOAT16, 64))),
    variant.attend_window(16, 64),
    variant.seal(integers(layout_of(Format.INT4, Number.BFLOAT16, 80))),
    variant.merge(256, 2),
    variant.rotate(96),
    variant.dequantise(integers(layout_of(Format.K8V4, Number.BFLOAT16, 80))),
}
EVERY = sorted({case.variant for case in cases()}, key=lambda made: (made.name, made.defines))


def builds() -> list[ParameterSet]:
    return [
        pytest.param(
            made,
            architecture,
            id=f"{title(made)}-{architecture}",
            marks=() if made in ALWAYS else pytest.mark.slow,
        )
        for made in EVERY
        for architecture in ARCHITECTURES
    ]


def test_all_that_is_always_compiled_is_in_the_matrix() -> None:
    assert set(EVERY) >= ALWAYS


@pytest.mark.parametrize(("made", "architecture"), builds())
def test_machine_code(cache_folder: Path, made: Variant, architecture: str) -> None:
    given = dict(made.defines)
    path = path_of(made, architecture, cache_folder / "cubins")
    used = resources(path)
    assert used["stack"] == used["local"] == 0, "registers spill to memory"
    assert used["registers"] <= budget(made)
    assert made.shared_bytes + used["shared"] <= MOST_SHARED
    if made.name.startswith("attend"):
        opcodes = instructions(path)
        copies = {opcode for opcode in opcodes if opcode.startswith("LDGSTS")}
        assert copies
        assert all("128" in opcode for opcode in copies), "keys and values come in 16 bytes, asynchronously"
        tensor = any(opcode.startswith("HMMA.16816") for opcode in opcodes)
        assert tensor == (given["K_BITS"] <= 16)
        assert not any(opcode.startswith(("LDL", "STL")) for opcode in opcodes)
        if made.name == "attend_records" and tensor:
            assert per_byte(made, path) <= MOST_PER_BYTE[given["K_BITS"], given["V_BITS"]]
