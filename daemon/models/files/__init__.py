"""Files of a model folder: its configuration, its weights, digests of their bytes.

May import: errors, models.families, models.quantised, offload.
"""
