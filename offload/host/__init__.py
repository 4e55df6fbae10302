"""Host memory: the slab of records, which blocks leave it, how they come back.

May import: offload.block_table, offload.errors, offload.size, offload.system.
"""
