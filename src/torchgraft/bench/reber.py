"""Reber strings: a small grammar, plain or embedded, strings that it accepts and strings that it does not.

An embedded string is B, T or P, a Reber string, the same T or P again, and E: one dependency over a long range.
Rejected embedded strings are accepted ones with the embedded symbol swapped or with one symbol replaced.
Rejected plain strings are accepted ones that go on in the wrong branch, or that are written in other letters.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from torchgraft.errors import BadInput

__all__ = ["accepts", "plain_reber_strings", "reber_strings"]

_SYMBOLS = "BTSXPVE"
_LETTERS = "BTSXPVEACDFGHIJKLMNOQRUWYZ"
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
    """Say whether ``text`` is a Reber string."""
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

    return _coded([accepted() if number % 2 == 0 else rejected() for number in range(count)], longest)


def _coded(texts: Sequence[str], longest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return symbols, lengths and labels of strings of which every second one, from the first, is accepted."""
    x = torch.zeros(len(texts), longest, dtype=torch.long)
    for row, text in enumerate(texts):
        x[row, : len(text)] = torch.tensor([_LETTERS.index(symbol) + 1 for symbol in text])
    return x, torch.tensor([len(text) for text in texts]), torch.arange(len(texts)).add(1) % 2


def _all_plain(longest: int) -> list[str]:
    """Return every Reber string of at most ``longest`` symbols."""
    found, open_ = list[str](), [("", 0)]
    while open_:
        text, state = open_.pop()
        if state == 7:
            found.append(text)
        elif len(text) < longest:
            open_ += [(text + symbol, after) for symbol, after in _GRAMMAR[state].items()]
    return found


def plain_reber_strings(count: int, *, seed: int = 0, longest: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``count`` plain strings, no two alike, so that any split of them is one into seen and unseen.

    Accepted ones are drawn from all that there are. Each is followed by a rejected one that was made from it, so that
    lengths do not tell the two apart: half of them have the other symbol of T and P in the second place, so that what
    follows belongs to the wrong branch, and in the others every symbol between B and E is another letter throughout.

    Args:
        count: how many, an even number.
        seed: makes the draws.
        longest: symbols of the longest string.

    Shapes:
        -> (count, longest), (count,), (count,)

    Example:
        >>> x, lengths, y = plain_reber_strings(4, longest=8)
        >>> x.shape, y.tolist(), len(set(map(tuple, x.tolist()))), bool((lengths[::2] == lengths[1::2]).all())
        (torch.Size([4, 8]), [1, 0, 1, 0], 4, True)

    Raises:
        BadInput: there are fewer strings of at most ``longest`` symbols, or ``count`` is odd.
    """
    every = _all_plain(longest)
    if count < 0 or count % 2 or count // 2 > len(every):
        raise BadInput(f"count must be even and at most {2 * len(every)} with longest {longest}, got {count}")
    draw = np.random.default_rng(seed)
    texts: list[str] = []
    seen: set[str] = set()
    for number in draw.permutation(len(every))[: count // 2]:
        text = every[int(number)]
        other = f"B{'P' if text[1] == 'T' else 'T'}{text[2:]}"
        if draw.random() < 0.5:
            other = text
        while _plain(other) or other in seen:
            code = dict(zip(_SYMBOLS, draw.permutation(list(_LETTERS)), strict=False))
            other = f"B{''.join(code[symbol] for symbol in text[1:-1])}E"
        seen.add(other)
        texts += [text, other]
    return _coded(texts, longest)
