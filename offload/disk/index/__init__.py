"""The index of the disk tier, in SQLite.

May import: offload.disk.files, offload.errors, offload.record, offload.store_layout, offload.table.
"""
