"""Families of models: those that are served, the class for each, and where a wrapper has its text part.

May import: errors.
"""
