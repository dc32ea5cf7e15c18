"""Modules that store and retrieve: associative memories, codebooks, bottlenecks of keys and values."""
