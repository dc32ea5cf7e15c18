"""Normalisation layers, and conversions of the norms of a model that exists."""
