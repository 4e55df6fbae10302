"""The loops of a kernel's machine code, and how many instructions a turn of them takes.

Instructions come from nvdisasm. A loop is a set of blocks from each of which a way leads to all others; the
loops inside of it are those that are left without the ways to where it is entered.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

LABEL = re.compile(r"^(\.L_\w+):")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)([^;]*);")
TARGET = re.compile(r"^(.*?)`\((\.L_\w+)\)")
JUMPS = ("BRA", "CALL.REL.NOINC")
"""Of calls those to a label: to a function they have none."""
Ways = Mapping[int, set[int]]


@dataclass
class Block:
    """Instructions that run one after the other."""

    opcodes: list[str] = field(default_factory=list)
    next: list[int] = field(default_factory=list)
    """Indices of the blocks that may follow."""


@dataclass(frozen=True)
class Loop:
    """One of a kernel's loops, or the kernel itself. members: indices of its blocks."""

    members: frozenset[int]
    blocks: Sequence[Block]
    inner: list[Loop]

    @cached_property
    def own(self) -> list[str]:
        """Opcodes outside of inner loops."""
        nested = frozenset[int]().union(*(loop.members for loop in self.inner))
        return [opcode for i in self.members - nested for opcode in self.blocks[i].opcodes]

    @cached_property
    def every(self) -> list[str]:
        """Opcodes, inner loops included."""
        return [opcode for i in self.members for opcode in self.blocks[i].opcodes]


def loops_of(disassembly: str) -> Loop:
    """The first function as a loop of one turn, with its loops inside, each list in order of address."""
    blocks = _blocks(disassembly)
    following = {i: set(block.next) for i, block in enumerate(blocks)}
    reached = _ahead(following)[0]
    members = frozenset(i for i in range(len(blocks)) if i == 0 or reached >> i & 1)
    return Loop(members, blocks, list(_inside(members, following, blocks)))


def _inside(members: frozenset[int], following: Ways, blocks: Sequence[Block]) -> Iterator[Loop]:
    ahead = _ahead({i: following[i] & members for i in members})
    left = members
    for i in sorted(members):
        loop = frozenset(j for j in left if i in left and ahead[i] >> j & 1 and ahead[j] >> i & 1)
        if loop:
            entries = {j for k in members - loop for j in following[k] & loop} or {i}
            rest = {k: following[k] - entries for k in loop}
            yield Loop(loop, blocks, list(_inside(loop, rest, blocks)))
            left -= loop


def _ahead(following: Ways) -> dict[int, int]:
    """Where one can come to from each block, in one step or more, as bits."""
    ahead = {i: sum(1 << j for j in steps) for i, steps in following.items()}
    for through in following:
        for i in following:
            if ahead[i] >> through & 1:
                ahead[i] |= ahead[through]
    return ahead


def _blocks(text: str) -> list[Block]:
    """A jump that only lanes take which have lost each other (BRA.DIV) is none here."""
    blocks, names = [Block()], dict[str, int]()
    jumps: list[tuple[int, str]] = []
    open_end = False
    for line in text.splitlines():
        if label := LABEL.match(line):
            if blocks[-1].opcodes:
                _begin(blocks, follows=open_end)
            names[label[1]] = len(blocks) - 1
        elif found := INSTRUCTION.match(line):
            predicate, opcode, operands = found.groups()
            if not open_end and blocks[-1].opcodes:
                _begin(blocks, follows=False)
            blocks[-1].opcodes.append(opcode)
            target = TARGET.match(operands)
            jumping = target and opcode.startswith(JUMPS) and not opcode.startswith("BRA.DIV")
            if jumping and target:
                jumps.append((len(blocks) - 1, target[2]))
            always = not predicate and not (target and target[1].strip())
            open_end = not (always and (jumping or opcode.startswith(("EXIT", "RET"))))
            if jumping and open_end:
                _begin(blocks, follows=True)
    for i, name in jumps:
        blocks[i].next.append(names[name])
    return blocks


def _begin(blocks: list[Block], *, follows: bool) -> None:
    if follows:
        blocks[-1].next.append(len(blocks))
    blocks.append(Block())
