"""Retrieval: encoders of texts and of other things, and what makes them elastic."""
