"""Serves language models on one machine with contexts larger than its GPU.

The folders here are rooms: each says in its `__init__` what lives there and which rooms it may import.
ARCHITECTURE.md shows them together; what lies here beside them is of the whole house.
"""
