"""Loops, as they are read from a disassembly."""

from __future__ import annotations

import pytest

from spilld.cuda_ext.compile import variant
from spilld.offload.record import Element, Format, Layout

from .instructions import per_tile
from .machine_code import loops_of

NESTED = """
\t.section .text.kernel
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_9) ;
.L_x_1:
        /*0020*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0030*/                   BRA.DIV UR4, `(.L_x_8) ;
.L_x_2:
        /*0040*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0050*/                   BRA P1, `(.L_x_2) ;
.L_x_3:
        /*0060*/               @P2 CALL.REL.NOINC `(.L_x_9) ;
        /*0070*/                   CALL.REL.NOINC `($division) ;
        /*0080*/                   BRA `(.L_x_1) ;
.L_x_8:
        /*0090*/                   SHFL.BFLY P0, R3, R4, 0x1, 0x1f ;
        /*00a0*/                   BRA `(.L_x_2) ;
.L_x_9:
        /*00b0*/                   EXIT ;
        .type           $division,@function
$division:
        /*00c0*/                   MUFU.RCP R2, R3 ;
.L_x_10:
        /*00d0*/               @P0 BRA `(.L_x_10) ;
        /*00e0*/                   RET.REL.NODEC R8 `(kernel) ;
"""


def test_a_loop_in_a_loop() -> None:
    kernel = loops_of(NESTED)
    assert len(kernel.every) == 10, "neither lanes that lost each other nor functions"
    assert sorted(kernel.own) == ["BRA", "EXIT", "MOV"]
    (outer,) = kernel.inner
    assert sorted(outer.own) == ["BRA", "BRA.DIV", "CALL.REL.NOINC", "CALL.REL.NOINC", "IADD3"]
    (inner,) = outer.inner
    assert sorted(inner.every) == ["BRA", "HMMA.16816.F32.BF16"]
    assert inner.inner == []


def test_two_ways_into_a_loop() -> None:
    kernel = loops_of(NESTED.replace("BRA `(.L_x_9)", "BRA `(.L_x_3)"))
    (outer,) = kernel.inner
    assert len(outer.every) == 7
    assert [len(loop.every) for loop in outer.inner] == [2]


TILES = """
.L_x_1:
        /*0000*/                   MOV R2, R3 ;
.L_x_2:
        /*0010*/                   LDGSTS.E.BYPASS.128 [R2], [R4.64] ;
        /*0020*/                   LDGSTS.E.BYPASS.128 [R2], [R4.64] ;
        /*0030*/               @P0 BRA `(.L_x_2) ;
.L_x_3:
        /*0040*/                   LDSM.16.M88.4 R8, [R2] ;
.L_x_4:
        /*0050*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0060*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0070*/               @P0 BRA `(.L_x_4) ;
        /*0080*/               @P0 BRA `(.L_x_3) ;
.L_x_5:
{values}
        /*0080*/               @P0 BRA `(.L_x_5) ;
        /*0090*/               @P0 BRA `(.L_x_1) ;
        /*00a0*/                   EXIT ;
"""


@pytest.mark.parametrize("products", [16, 15])
def test_turns_of_a_tile(products: int) -> None:
    values = "\n".join(
        ["        /*0080*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;"] * products
    )
    kernel = loops_of(TILES.format(values=values))
    made = variant.attend_records(Layout(Format.EXACT, Element.BFLOAT16, 8, 64).constants)
    if products != 16:
        with pytest.raises(ValueError, match="15 products in 4 turns are not 64"):
            per_tile(made, kernel)
        return
    # Copies: 16 of keys and 16 of values. Keys: 2 turns of 16 turns of two products. Values: 4 turns of 16.
    assert per_tile(made, kernel) == 2 + 32 * 3 / 2 + 2 * (2 + 16 * 3) + 4 * 17
