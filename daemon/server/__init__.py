"""The server: takes requests from connections, holds clients to their limits, sends events back.

May import: auth, errors, monitoring, protocol, transport.
"""
