"""Keys of daemons and clients, and the file that says which clients are authorised.

May import: errors, fields, protocol, toml_file.
"""
