"""Embedded Reber strings: a small grammar with one long-range dependency, accepted or with one symbol wrong.

A string is B, T or P, a Reber string, the same T or P again, and E. Rejected ones are accepted ones with the embedded
symbol swapped, or with one symbol replaced, half and half.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from torchgraft.errors import BadInput

__all__ = ["accepts", "reber_strings"]

_SYMBOLS = "BTSXPVE"
#: State -> symbol -> next state; state 6 ends by E.
_GRAMMAR: tuple[dict[str, int], ...] = (
    {"B": 1},
    {"T": 2, "P": 3},
    {"S": 2, "X": 4},
    {"T": 3, "V": 5},
    {"X": 3, "S": 6},
    {"P": 4, "V": 6},
    {"E": 7},
)


def _plain(text: str) -> bool:
    state = 0
    for symbol in text:
        if state == 7 or symbol not in _GRAMMAR[state]:
            return False
        state = _GRAMMAR[state][symbol]
    return state == 7


def accepts(text: str) -> bool:
    """Say whether ``text`` is an embedded Reber string: B, T or P, a Reber string, the same T or P again, E.

    Example:
        >>> accepts("BTBTXSETE"), accepts("BTBTXSEPE")
        (True, False)
    """
    framed = len(text) >= 4 and text[0] == "B" and text[-1] == "E" and text[1] in "TP" and text[1] == text[-2]
    return framed and _plain(text[2:-2])


def reber_strings(count: int, *, seed: int = 0, longest: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``count`` strings, half of them accepted: symbols (0 is padding), lengths and labels.

    Args:
        count: how many.
        seed: makes the draws.
        longest: longer strings are drawn again.

    Shapes:
        -> (count, longest), (count,), (count,)

    Example:
        >>> x, lengths, y = reber_strings(4)
        >>> x.shape, y.tolist(), int(x[0, lengths[0] - 1])
        (torch.Size([4, 24]), [1, 0, 1, 0], 7)

    Raises:
        BadInput: ``longest`` leaves no string.
    """
    if longest < 9:
        raise BadInput(f"the shortest embedded Reber string has 9 symbols, got longest {longest}")
    draw = np.random.default_rng(seed)

    def accepted() -> str:
        while True:
            state, text = 0, ""
            while state != 7:
                symbol = str(draw.choice(sorted(_GRAMMAR[state])))
                text, state = text + symbol, _GRAMMAR[state][symbol]
            frame = str(draw.choice(["T", "P"]))
            if len(text) + 4 <= longest:
                return f"B{frame}{text}{frame}E"

    def rejected() -> str:
        text = accepted()
        if draw.random() < 0.5:
            return f"{text[:-2]}{'P' if text[-2] == 'T' else 'T'}E"
        while True:
            place = int(draw.integers(len(text)))
            other = text[:place] + str(draw.choice(list(_SYMBOLS))) + text[place + 1 :]
            if not accepts(other):
                return other

    texts = [accepted() if number % 2 == 0 else rejected() for number in range(count)]
    x = torch.zeros(count, longest, dtype=torch.long)
    for row, text in enumerate(texts):
        x[row, : len(text)] = torch.tensor([_SYMBOLS.index(symbol) + 1 for symbol in text])
    return x, torch.tensor([len(text) for text in texts]), torch.arange(count).add(1) % 2
