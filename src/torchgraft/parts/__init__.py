"""Modules that are put inside a network."""
