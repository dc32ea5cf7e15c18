"""Generative models: samplers, and surgery on models that sample."""
