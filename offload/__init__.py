"""The tiered store: records, codecs, host slab, disk extents, residency, prefetch. Numpy in, numpy out."""
