"""What client and daemon say to each other: messages, their bytes, the addresses. PROTOCOL.md specifies it.

May import: errors, fields.
"""
