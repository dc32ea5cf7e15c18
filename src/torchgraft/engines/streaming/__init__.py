"""Streams: a trained clip network run frame by frame, with what it has computed kept in ring buffers."""

from __future__ import annotations

from torchgraft.engines.streaming.attention import (
    EncoderCell,
    RecyclingPositionalEncoding,
    RetroactiveAttention,
    SingleOutputAttention,
)
from torchgraft.engines.streaming.cells import Cell, LastCell, MeanCell, SkipCell, WindowCell
from torchgraft.engines.streaming.network import ContinualNetwork

__all__ = [
    "Cell",
    "ContinualNetwork",
    "EncoderCell",
    "LastCell",
    "MeanCell",
    "RecyclingPositionalEncoding",
    "RetroactiveAttention",
    "SingleOutputAttention",
    "SkipCell",
    "WindowCell",
]
