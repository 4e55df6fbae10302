"""Segment files: where extents lie in them, how an extent looks, the folder they are in.

May import: offload.errors, offload.record, offload.store_layout, offload.system.
"""
