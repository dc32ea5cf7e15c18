"""Claims of the family parts/blocks."""
