"""The client library: one core without sockets, blocking and asyncio clients around it.

May import: auth, errors, fields, protocol.
"""
