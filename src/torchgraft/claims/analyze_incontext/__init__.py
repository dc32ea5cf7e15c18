"""Claims of the family analyze/incontext."""
