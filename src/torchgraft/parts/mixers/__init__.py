"""Sequence mixers: modules (B, T, D) -> (B, T, D) in which tokens see each other, one file a method."""
