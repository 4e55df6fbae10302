"""The disk tier: runs of extents, reads ahead, writes behind.

May import: offload.disk.files, offload.disk.index, offload.errors, offload.record, offload.size,
offload.store_layout, offload.system.
"""
