"""Claims of the family parts/mixers."""
