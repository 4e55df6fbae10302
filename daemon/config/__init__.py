"""The configuration: settings, their file, what may change while the daemon runs, models with names.

May import: auth, errors, fields, offload, protocol, toml_file.
"""
