"""The daemon's end of ZeroMQ: ZMTP and CURVE as bytes, connections, the listening socket.

May import: auth, errors, protocol.
"""
