"""Claims of the family generate."""
