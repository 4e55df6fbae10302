"""The store: records of all sequences in host memory and on disk, as one; composed of the other rooms.

May import: offload.block_table, offload.disk, offload.errors, offload.host, offload.maintenance,
offload.prefix_cache, offload.record, offload.size, offload.store_layout, offload.system.
"""
