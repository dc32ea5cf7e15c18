"""Claims of the family analyze/circuits."""
