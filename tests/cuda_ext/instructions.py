"""Instructions per byte of KV beside what GPUs afford: `python -m tests.cuda_ext.instructions`.

An estimate, from machine code that nothing has run: instructions that a warp of attention over records issues
for a tile of 64 tokens and up to 16 rows of queries, by the bytes that it reads for it. Loops of tensor cores
turn as often as their products take; copies count as often as there are 16 bytes for a lane, with the loops
around them; everything else once, on either side of a branch. A GPU affords what its schedulers issue, one
instruction each a clock, while its DRAM delivers a byte, by its data sheet: kernels above that are bound by
instructions, those below by bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from spilld.cuda_ext.compile import variant
from spilld.cuda_ext.compile.build import path_of
from spilld.cuda_ext.compile.variant import BLOCK, Variant
from spilld.models.catalog import default_cache
from spilld.offload.record import SEALED, Element, Layout

from .cubins import disassembly
from .machine_code import Loop, loops_of

VECTORS = 32 * 16
"""Bytes that the lanes of a warp copy at once."""


@dataclass(frozen=True)
class Gpu:
    name: str
    multiprocessors: int
    gigahertz: float
    """Its boost clock; of H100 and B200 the one that their stated rates of products come to."""
    gigabytes_s: float

    @property
    def affords(self) -> float:
        """Instructions of warps per byte of DRAM; a multiprocessor has four schedulers."""
        return 4 * self.multiprocessors * self.gigahertz / self.gigabytes_s


GPUS = {
    "sm_80": Gpu("A100 80GB", 108, 1.41, 2039),
    "sm_86": Gpu("RTX 3090", 82, 1.70, 936),
    "sm_89": Gpu("RTX 4090", 128, 2.52, 1008),
    "sm_90": Gpu("H100 SXM", 132, 1.83, 3350),
    "sm_100": Gpu("B200", 148, 1.85, 8000),
    "sm_120": Gpu("RTX 5090", 170, 2.41, 1792),
}


def per_byte(made: Variant, cubin: Path) -> float:
    """Of attend_records over numbers of 16 bits or less, in this machine code.

    Raises ValueError if the loops in it are not those that the source has.
    """
    return per_tile(made, loops_of(disassembly(cubin))) / sum(plane_bytes(dict(made.defines)))


def per_tile(made: Variant, kernel: Loop) -> float:
    given = dict(made.defines)
    tiles = [loop for loop in kernel.inner if products(loop)]
    if len(tiles) != 1:
        raise ValueError(f"{len(tiles)} loops have products, not one over tiles")
    keys_and_values = [loop for loop in tiles[0].inner if products(loop)]
    copying = [loop for loop in tiles[0].inner if copies(loop) and not products(loop)]
    others = [loop for loop in tiles[0].inner if not products(loop) and not copies(loop)]
    if len(keys_and_values) != 2:
        raise ValueError(
            f"{len(keys_and_values)} loops of a tile have products, not one of keys and one of values"
        )
    keys, values = keys_and_values
    minima = 2 * BLOCK // 16 if given["V_BITS"] == 4 else 0
    total = turns(keys, 2, given["HEAD_DIM"]) + turns(values, BLOCK // 16, given["HEAD_DIM"] + minima)
    around = sum(len(loop.every) for loop in copying) / max(1, sum(map(copies, copying)))
    total += around * sum(-(-nbytes // VECTORS) for nbytes in plane_bytes(given))
    return total + len(tiles[0].own) + sum(len(loop.every) for loop in others)


def plane_bytes(given: Mapping[str, int]) -> tuple[int, int]:
    """Bytes of codes and scales of K and of V of one KV head in a record."""
    scales = {8: 2 * BLOCK, 4: 4 * BLOCK * -(-given["HEAD_DIM"] // 32)}
    keys, values = (
        given["HEAD_DIM"] * BLOCK * given[bits] // 8 + scales.get(given[bits], 0)
        for bits in ("K_BITS", "V_BITS")
    )
    return keys, values


def turns(loop: Loop, count: int, wanted: int) -> float:
    """Instructions of so many turns, in which the tensor cores multiply `wanted` times."""
    inside = [inner for inner in loop.inner if products(inner)]
    own = len(loop.own) + sum(len(inner.every) for inner in loop.inner if not products(inner))
    left = wanted // count - sum(map(is_product, loop.own))
    if not inside and (left or wanted % count):
        raise ValueError(f"{products(loop)} products in {count} turns are not {wanted}")
    if not inside:
        return count * own
    if len(inside) > 1 or left < 1 or left % products(inside[0]) or wanted % count:
        raise ValueError(f"{wanted} products are no number of turns of {len(inside)} loops inside {count}")
    return count * (own + turns(inside[0], left // products(inside[0]), left))


def products(loop: Loop) -> int:
    return sum(map(is_product, loop.every))


def is_product(opcode: str) -> bool:
    return opcode.startswith("HMMA")


def copies(loop: Loop) -> int:
    return sum(opcode.startswith("LDGSTS") for opcode in loop.every)


def main() -> None:
    print("instructions of a warp per byte of KV, an estimate, beside what a GPU affords; above it: *")
    print(" ".join([f"{'':12}", *(f"{gpu.name:>11}" for gpu in GPUS.values())]))
    print(" ".join([f"{'affords':12}", *(f"{gpu.affords:10.2f} " for gpu in GPUS.values())]))
    folder = default_cache() / "cubins"
    for form in SEALED:
        for head_dim in (64, 128, 256):
            made = variant.attend_records(Layout(form, Element.BFLOAT16, 8, head_dim).constants)
            words = [f"{form} {head_dim}".ljust(12)]
            for architecture, gpu in GPUS.items():
                ratio = per_byte(made, path_of(made, architecture, folder))
                words.append(f"{ratio:10.2f}{'*' if ratio > gpu.affords else ' '}")
            print(" ".join(words))


if __name__ == "__main__":
    main()
