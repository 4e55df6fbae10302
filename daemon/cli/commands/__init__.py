"""The commands of `spilld`: a module for each adds its options and runs it.

May import: assembly, auth, cli, client, config, demo, errors, monitoring, protocol.
"""
