"""The index of the disk tier, in SQLite.

May import: offload.block_table, offload.disk.files, offload.errors, offload.record, offload.store_layout.
"""
