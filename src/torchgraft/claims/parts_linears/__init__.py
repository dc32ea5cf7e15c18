"""Claims of the family parts/linears."""
