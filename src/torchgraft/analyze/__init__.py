"""Measure what a network does: attribution, circuits, representations, landscapes."""
