"""Bugs, made mechanically of a kernel's source: all of them in one text, each asleep until its number is set.

After an operator stands an operand: a bound, a mask, a stride, a scale, an offset. It becomes one more (a
bound one less, too) or is dropped, which is to become what makes the operator idle. What an index or a
number is set to becomes one more. Each barrier, warp sync, commit and wait goes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

RUNTIME = """#pragma once
extern "C" {
int mutant_awake = -1;
unsigned char mutants_reached[MUTANTS];
}
__attribute__((noinline, no_sanitize("thread"))) inline bool awake(int n) {
  mutants_reached[n] = 1;
  return mutant_awake == n;
}
template <class T>
inline T more(int n, T x) {
  if constexpr (std::is_same<T, bool>::value) return awake(n) ? !x : x;
  else return awake(n) ? (T)(x + 1) : x;
}
template <class T>
inline T less(int n, T x) { return awake(n) ? (T)(x - 1) : x; }
template <class T, class I>
inline T idle(int n, T x, I value) { return awake(n) ? (T)value : x; }
"""
"""What the mutated text calls. MUTANTS: how many there are, which a -D says."""

TOKEN = re.compile(
    r"//[^\n]*|#[^\n]*|\"[^\"]*\"|[A-Za-z_]\w*(?:::\w+)*|0x[\da-fA-F.]+p[-+]?\d+f?|\d[\w.]*"
    r"|<<|>>|<=|>=|==|!=|&&|\|\||->|\+\+|--|[-+*/%&|^]=|\S"
)
PRECEDENCE = {
    **dict.fromkeys(("*", "/", "%"), 9),
    **dict.fromkeys(("+", "-"), 8),
    **dict.fromkeys(("<<", ">>"), 7),
    **dict.fromkeys(("<", "<=", ">", ">="), 6),
    **dict.fromkeys(("==", "!="), 5),
    "&": 4,
    "^": 3,
    "|": 2,
    "&&": 1,
    "||": 0,
    **dict.fromkeys(("=", "+=", "-=", "*=", "/=", "|=", "&=", ">>=", "<<="), -1),
}
IDLE = {
    **dict.fromkeys(("+", "-", "<<", ">>", "|", "^", "+=", "-=", "|="), "0"),
    **dict.fromkeys(("*", "/", "*=", "/="), "1"),
    **dict.fromkeys(("&", "&="), "-1"),
    **dict.fromkeys(("<", "<="), "0x7fffffff"),
    **dict.fromkeys((">", ">="), "-0x7fffffff"),
    "%": "0x7fffffff",
    "&&": "true",
    "||": "false",
}
NAMES = "float|float2|float4|int|bool|char|u8|u16|u32|u64|i64|uint4|Element"
TYPES = rf"(?:const |signed |unsigned |static )*(?:{NAMES})\b"
DECLARATION = re.compile(rf"\s*{TYPES}[^=()]*$")
CAST = re.compile(rf"{TYPES}\s*\**$")
ENDLESS = re.compile(r"^-?(INFINITE|NOT_A_NUMBER)$")
"""One more than these is the same."""
SYNCS = re.compile(r"\b(__syncthreads|__syncwarp|commit_copies|wait_copies<[^;]*?>)\(\);")


@dataclass(frozen=True)
class Mutant:
    number: int
    file: str
    line: int
    column: int
    code: str
    """The line, stripped."""
    change: str
    """What becomes of it, in words."""


@dataclass(frozen=True)
class _Token:
    text: str
    start: int
    end: int


@dataclass(frozen=True)
class _Edit:
    """Text from start to end goes into a call of a function of RUNTIME."""

    start: int
    end: int
    function: str
    argument: str
    change: str


def mutate(file: str, text: str, first: int) -> tuple[str, list[Mutant]]:
    """The text with all its bugs asleep, numbered from `first` on, and what they are."""
    edits = sorted(_edits(text), key=lambda edit: (edit.start, -edit.end))
    mutants, inserted = [], []
    for number, edit in enumerate(edits, first):
        line = text.count("\n", 0, edit.start)
        begin = text.rfind("\n", 0, edit.start) + 1
        code = text.splitlines()[line].strip()
        mutants.append(Mutant(number, file, line + 1, edit.start - begin + 1, code, edit.change))
        opening = f"{edit.function}({number}, " if edit.function != "unless" else f"if (!awake({number})) "
        # Of edits that begin together the longer opens first, and closes last.
        inserted.append((edit.start, 1, number, opening))
        if edit.function != "unless":
            inserted.append((edit.end, 0, -number, f"{edit.argument})"))
    for at, _, _, words in sorted(inserted, reverse=True):
        text = text[:at] + words + text[at:]
    return text, mutants


def _edits(text: str) -> Iterator[_Edit]:
    for sync in SYNCS.finditer(text):
        yield _Edit(sync.start(), sync.end(), "unless", "", f"without {sync[1]}")
    tokens = [_Token(match[0], match.start(), match.end()) for match in TOKEN.finditer(text)]
    tokens = [token for token in tokens if not token.text.startswith(("//", "#", '"'))]
    constants = list(_constants(text, tokens))
    for i, token in enumerate(tokens):
        if any(start <= token.start < end for start, end in constants):
            continue
        if token.text == "[" and i and _ends_operand(tokens[i - 1]):
            yield from _changes(text, tokens, i + 1, _matching(tokens, i), "[]")
        elif token.text in PRECEDENCE and _is_binary(text, tokens, i):
            end = _operand_end(text, tokens, i + 1, PRECEDENCE[token.text])
            yield from _changes(text, tokens, i + 1, end, token.text)


def _constants(text: str, tokens: Sequence[_Token]) -> Iterator[tuple[int, int]]:
    """Where the compiler computes, not the kernel: constants are changed where they are used."""
    for line in re.finditer(
        r"[^\n]*\b(constexpr|template|static_assert|using|typedef|operator)\b[^\n]*", text
    ):
        yield line.span()
    for i, token in enumerate(tokens):
        if token.text == "[" and _is_size(text, token.start):
            yield token.start, tokens[_matching(tokens, i)].end
        if token.text == "<" and text[token.start - 1] != " ":
            yield token.start, text.index(">", token.start)


def _changes(text: str, tokens: Sequence[_Token], begin: int, end: int, operator: str) -> Iterator[_Edit]:
    start, stop = tokens[begin].start, tokens[end - 1].end
    operand = text[start:stop]
    if "{" in operand or tokens[end].text == "{":
        return
    if operator not in ("&&", "||") and not ENDLESS.search(operand):
        yield _Edit(start, stop, "more", "", f"{operator} {operand}: one more")
    if operator in ("<", "<=", ">", ">="):
        yield _Edit(start, stop, "less", "", f"{operator} {operand}: one less")
    if operator in IDLE:
        yield _Edit(start, stop, "idle", f", {IDLE[operator]}", f"{operator} {operand}: dropped")


def _is_size(text: str, at: int) -> bool:
    """Whether this bracket holds the size of an array that is declared."""
    begin = max(text.rfind(mark, 0, at) for mark in ";{}") + 1
    line = text[text.rfind("\n", 0, at) + 1 : at]
    return bool(DECLARATION.match(text[begin:at].lstrip("\n"))) or bool(
        re.search(r"\(&\w+\)(\[\w+\])*$", line)
    )


def _is_binary(text: str, tokens: Sequence[_Token], i: int) -> bool:
    token = tokens[i]
    spaced = text[token.start - 1] in " \n" and text[token.end] in " \n"
    return (
        spaced and (_ends_operand(tokens[i - 1]) or token.text[-1] == "=") and tokens[i - 1].text != "return"
    )


def _ends_operand(token: _Token) -> bool:
    return token.text in (")", "]") or token.text[0].isalnum() or token.text[0] == "_"


def _matching(tokens: Sequence[_Token], i: int) -> int:
    """The index of the bracket that closes the one at i."""
    depth = 0
    while True:
        depth += (tokens[i].text in ("(", "[", "{")) - (tokens[i].text in (")", "]", "}"))
        if depth == 0:
            return i
        i += 1


def _operand_end(text: str, tokens: Sequence[_Token], i: int, precedence: int) -> int:
    """One past the operand that begins at i: all that binds more than the operator before it."""
    i = _primary_end(text, tokens, i)
    while tokens[i].text in PRECEDENCE and PRECEDENCE[tokens[i].text] > precedence:
        i = _primary_end(text, tokens, i + 1)
    if precedence == -1 and tokens[i].text == "?":
        while tokens[i].text not in (";", ","):
            i = _matching(tokens, i) + 1 if tokens[i].text in ("(", "[") else i + 1
    return i


def _primary_end(text: str, tokens: Sequence[_Token], i: int) -> int:
    while tokens[i].text in ("-", "!", "~", "*", "&", "++"):
        i += 1
    if tokens[i].text == "(":
        end = _matching(tokens, i)
        if CAST.match(text[tokens[i].end : tokens[end].start]):
            return _primary_end(text, tokens, end + 1)
        i = end + 1
    else:
        i += 1
        if tokens[i].text == "<" and text[tokens[i].start - 1] != " ":
            while tokens[i].text != ">":
                i += 1
            i += 1
    while tokens[i].text in ("(", "[", ".", "->", "++"):
        i = (
            _matching(tokens, i) + 1
            if tokens[i].text in ("(", "[")
            else i + (1 if tokens[i].text == "++" else 2)
        )
    return i
