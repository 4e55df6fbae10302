"""The commands of `spilld`: a module for each adds its options and runs it.

They import neither torch nor numpy, and what draws or computes only when they run: --help is fast, and works
where the engine is not installed.
"""
