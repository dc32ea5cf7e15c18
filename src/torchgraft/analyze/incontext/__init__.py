"""Learning in context: what a transformer does with the examples before its query."""
