"""What goes on beside requests: compaction, the budget of writes, the check of all that is stored.

May import: offload.disk, offload.errors, offload.prefix_cache, offload.record, offload.system.
"""
