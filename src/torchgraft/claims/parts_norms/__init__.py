"""Claims of the family parts/norms."""
