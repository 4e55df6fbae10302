"""What the daemon says of itself: log, metrics, statistics, systemd, memory, failures.

May import: cuda_ext, errors, offload, printable, protocol.
"""
