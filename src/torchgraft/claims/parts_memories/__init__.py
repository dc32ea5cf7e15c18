"""Claims of the family parts/memories."""
