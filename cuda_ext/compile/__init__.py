"""From a kernel's source and constants to machine code, without a toolkit, a GPU or a driver.

May import: nothing.
"""
