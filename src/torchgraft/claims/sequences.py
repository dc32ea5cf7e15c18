"""What the claims on sequence mixers share: training in a :class:`SequenceModel` by fixed settings, and scores.

The code stands with the parts, where the survey of mixers uses it too; claims take it from here.
"""

from __future__ import annotations

from torchgraft.parts.blocks.sequence_training import accuracy, accuracy_by_length, bits_per_byte, train_mixer

__all__ = ["accuracy", "accuracy_by_length", "bits_per_byte", "train_mixer"]
