"""Which request runs next, and how many of its tokens. Pure: no clocks, no tensors, no I/O.

May import: kv, protocol.
"""
