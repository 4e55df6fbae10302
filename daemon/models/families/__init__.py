"""Families of models: those that are served, the class for each, text parts of wrappers, RoPE.

May import: errors.
"""
