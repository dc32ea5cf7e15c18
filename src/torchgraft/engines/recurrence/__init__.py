"""Recurrences over tokens: linear ones in three forms, running softmax, non-linear cells, state spaces."""
