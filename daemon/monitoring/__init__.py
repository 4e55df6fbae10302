"""What the daemon says of itself: log, metrics, counters, systemd, memory, failures.

May import: cuda_ext, errors, offload, printable, protocol.
"""
