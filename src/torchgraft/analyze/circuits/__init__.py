"""Circuits: what single heads and units do, and when."""
