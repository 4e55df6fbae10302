"""What outlives a request and a process: sessions, the journal of requests, archives on their way.

May import: errors, kv, offload, protocol.
"""
