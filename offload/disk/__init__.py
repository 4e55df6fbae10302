"""The disk tier: runs of extents in segment files, their index, reads ahead, writes behind.

May import: offload.errors, offload.host, offload.record, offload.size, offload.system.
"""
