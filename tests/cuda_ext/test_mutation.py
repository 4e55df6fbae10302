"""The bugs that mutation.py makes."""

from __future__ import annotations

import pytest

from spilld.cuda_ext.compile.variant import KERNELS

from .mutation import mutate


def changes(text: str) -> set[str]:
    return {mutant.change for mutant in mutate("a.cu", text, 0)[1]}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (
            "{ x = a < b + 1; }",
            {"< b + 1: one more", "< b + 1: one less", "< b + 1: dropped", "+ 1: one more"},
        ),
        ("{ x = a < b + 1; }", {"+ 1: dropped", "= a < b + 1: one more"}),
        ("{ y = p[i * 16]; }", {"[] i * 16: one more", "* 16: one more", "* 16: dropped"}),
        ("{ y = (float)z & mask(1); }", {"& mask(1): one more", "& mask(1): dropped"}),
        ("{ total *= scale; }", {"*= scale: one more", "*= scale: dropped"}),
        ("{ if (a && b[i]) return; }", {"&& b[i]: dropped", "[] i: one more"}),
        ("{ __syncwarp(); }", {"without __syncwarp"}),
        ("{ wait_copies<STAGES - 1>(); }", {"without wait_copies<STAGES - 1>"}),
    ],
)
def test_what_an_expression_becomes(text: str, wanted: set[str]) -> None:
    assert wanted <= changes(text)


@pytest.mark.parametrize(
    "text",
    [
        "constexpr int ROWS = 16 + 1;",
        "{ float x[ROWS / 2], y; }",
        "{ tree<2 * Count>(x); }",
        "static_assert(A == B + 1, text);",
        "{ u8* p; const float *q, *r; }",
        "// a + b",
        "{ x = {1}; }",
        "{ x = -INFINITE; }",
    ],
)
def test_what_is_left_alone(text: str) -> None:
    assert changes(text) == set()


def test_asleep_the_text_is_the_same_but_for_calls() -> None:
    text = "{\n  x[i + 1] = a * b;\n  __syncwarp();\n}\n"
    mutated, mutants = mutate("a.cu", text, 7)
    assert mutated.splitlines() == [
        "{",
        "  x[more(7, i + more(8, idle(9, 1, 0)))] = more(10, a * more(11, idle(12, b, 1)));",
        "  if (!awake(13)) __syncwarp();",
        "}",
    ]
    assert [(m.number, m.line, m.column) for m in mutants][-1] == (13, 3, 3)
    assert mutants[0].code == "x[i + 1] = a * b;"


def test_every_kernel_gets_bugs() -> None:
    for path in KERNELS.glob("*.cu"):
        _, mutants = mutate(path.name, path.read_text(), 0)
        assert len({mutant.line for mutant in mutants}) >= 3, path
