"""Archives: the KV of one session in one file, copied out of a store and into one.

May import: offload.disk.files, offload.disk.index, offload.errors, offload.prefix_cache, offload.record,
offload.store, offload.store_layout, offload.system.
"""
