"""What the commands show and do: answers, conversations, tables, the doctor.

May import: client, config, cuda_ext, errors, kv, models, monitoring, offload, printable, protocol, runner.
"""
