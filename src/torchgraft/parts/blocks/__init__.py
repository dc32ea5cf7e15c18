"""Blocks and whole small networks that take any mixer."""
