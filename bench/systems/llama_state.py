"""What llama.cpp's llama_state_seq_get_data gives for one sequence, as of the pinned version."""

from __future__ import annotations

import numpy as np

HEAD, CELL, PLANES, ROWS = 16, 12, 8, 12
"""Bytes: what comes before the cells, the last 4 of it their number; a cell, (position, 1, sequence) in
int32; what comes before the planes, (values transposed, layers) in uint32; what comes before the rows of a
plane, their type in int32 and the bytes of one in uint64."""


def repeated(state: bytes, tokens: int) -> bytes:
    """The state of a sequence, its cells again and again until they are so many, at increasing positions.

    Planes are the keys of every layer, then the values of every layer. Raises ValueError if values lie
    transposed, as they do without flash attention.
    """
    cells = int.from_bytes(state[HEAD - 4 : HEAD], "little")
    at = HEAD + cells * CELL
    transposed, layers = np.frombuffer(state, np.uint32, 2, at)
    if transposed:
        raise ValueError("values that lie transposed cannot be repeated")
    table = np.zeros((tokens, 3), np.int32)
    table[:, 0], table[:, 1] = np.arange(tokens), 1
    parts = [state[: HEAD - 4], tokens.to_bytes(4, "little"), table.tobytes(), state[at : at + PLANES]]
    at += PLANES
    for _ in range(2 * int(layers)):
        row_bytes = int.from_bytes(state[at + 4 : at + ROWS], "little")
        rows = np.frombuffer(state, np.uint8, cells * row_bytes, at + ROWS).reshape(cells, row_bytes)
        parts += [state[at : at + ROWS], np.resize(rows, (tokens, row_bytes)).tobytes()]
        at += ROWS + rows.nbytes
    return b"".join(parts)
