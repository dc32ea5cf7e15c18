"""Modules that stand for a linear layer or a feed-forward block."""
