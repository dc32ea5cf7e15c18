"""Sub-word tokens by likelihood: merges that raise the likelihood of the corpus most, and the likeliest segmentation.

Under a unigram model with p_t = c_t / N, merging m occurrences of (a, b) into a new token changes the corpus's
log-likelihood L = sum_t c_t log c_t - N log N by exactly f(c_a - m) - f(c_a) + f(c_b - m) - f(c_b) + f(m) - f(N - m) +
f(N), with f(x) = x log x. Byte-pair encoding takes the most frequent pair instead. Bytes are the smallest tokens, so
that any text can be told.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Literal

from torchgraft.errors import BadInput

__all__ = ["SubwordTokenizer", "log_likelihood", "merge_gain", "train_subword"]

#: A word with the space before it, a run of signs with the space before it, or other white space; merges stay within.
_PIECE = re.compile(r"\s?\w+|\s?[^\w\s]+|\s+")
#: Count that stands for a token which the corpus does not hold.
_RARE = 0.5


def _f(x: float) -> float:
    return x * math.log(x) if x > 0 else 0.0


def merge_gain(first: int, second: int, pairs: int, total: int, *, same: bool = False, joined: int = 0) -> float:
    """Return by how much the log-likelihood of the corpus rises when two tokens are joined wherever they meet.

    Args:
        first: occurrences of the first token.
        second: of the second.
        pairs: how many pairs are joined.
        total: occurrences of all tokens.
        same: whether both are one token, as in "ll"; a pair then takes two of it.
        joined: occurrences of the joined token before, where other pairs spell it too.

    Example:
        >>> round(merge_gain(2, 2, 2, 4), 4), round(4 * math.log(2), 4)  # "abab": four halves become two ones
        (2.7726, 2.7726)
    """
    left = (
        _f(first - 2 * pairs) - _f(first) if same else _f(first - pairs) - _f(first) + _f(second - pairs) - _f(second)
    )
    return left + _f(joined + pairs) - _f(joined) - _f(total - pairs) + _f(total)


def log_likelihood(counts: Iterable[int]) -> float:
    """Return sum_t c_t log(c_t / N), the log-likelihood of tokens under their own frequencies.

    Example:
        >>> round(log_likelihood([1, 1]), 4)
        -1.3863
    """
    found = list(counts)
    return sum(_f(count) for count in found) - _f(sum(found))


class SubwordTokenizer:
    """A vocabulary of byte strings with probabilities, and the merges that made it.

    Args:
        counts: token -> occurrences in the corpus; every single byte is added where it is missing.
        merges: pairs of tokens in the order in which they were joined.
        objective: ``"likelihood"``, by which texts are split as is likeliest, or ``"frequency"``, by their merges.
        history: log-likelihood of the corpus before the first merge and after each.

    Example:
        >>> made = train_subword("low lower lowest " * 8, vocab_size=260)
        >>> made.decode(made.encode("slower")) == "slower"
        True
    """

    def __init__(
        self,
        counts: Mapping[bytes, int],
        merges: Sequence[tuple[bytes, bytes]] = (),
        *,
        objective: Literal["likelihood", "frequency"] = "likelihood",
        history: Sequence[float] = (),
    ) -> None:
        if objective not in ("likelihood", "frequency"):
            raise BadInput(f"objective must be 'likelihood' or 'frequency', got {objective!r}")
        singles = {bytes([byte]): counts.get(bytes([byte]), 0) for byte in range(256)}
        joined = {token: count for token, count in counts.items() if len(token) > 1}
        self.tokens: tuple[bytes, ...] = (*singles, *joined)
        self.merges, self.objective, self.history = tuple(merges), objective, tuple(history)
        known = [max({**singles, **joined}[token], _RARE) for token in self.tokens]
        total = sum(known)
        self.log_probability = {token: math.log(count / total) for token, count in zip(self.tokens, known, strict=True)}
        self._number = {token: number for number, token in enumerate(self.tokens)}
        self._rank = {pair: rank for rank, pair in enumerate(self.merges)}
        self._longest = max(map(len, self.tokens))
        self._cache: dict[bytes, tuple[bytes, ...]] = {}

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, text: str) -> list[int]:
        """Return the numbers of the tokens of ``text``."""
        found: list[int] = []
        for piece in _pieces(text):
            if piece not in self._cache:
                split = self.viterbi(piece) if self.objective == "likelihood" else self.merged(piece)
                self._cache[piece] = tuple(split)
            found += [self._number[token] for token in self._cache[piece]]
        return found

    def decode(self, numbers: Iterable[int]) -> str:
        """Return the text of tokens; bytes that are no text become the replacement sign.

        Raises:
            BadInput: a number is no token's.
        """
        try:
            return b"".join(self.tokens[number] for number in numbers).decode("utf-8", "replace")
        except IndexError:
            raise BadInput(f"numbers of tokens must lie below {len(self.tokens)}") from None

    def viterbi(self, piece: bytes) -> list[bytes]:
        """Return the likeliest tokens that spell ``piece``; of equal ones those whose last tokens are shortest."""
        best: list[tuple[float, int]] = [(0.0, 0)]  # log-probability of a beginning, and where its last token starts
        for end in range(1, len(piece) + 1):
            ways = [
                (best[begin][0] + self.log_probability[piece[begin:end]], begin)
                for begin in range(max(0, end - self._longest), end)
                if piece[begin:end] in self.log_probability
            ]
            best.append(max(ways))
        found: list[bytes] = []
        end = len(piece)
        while end:
            begin = best[end][1]
            found.append(piece[begin:end])
            end = begin
        return found[::-1]

    def merged(self, piece: bytes) -> list[bytes]:
        """Return ``piece`` after all merges, the earliest of them first."""
        tokens = [bytes([byte]) for byte in piece]
        while len(tokens) > 1:
            ranks = [self._rank.get(pair, len(self._rank)) for pair in pairwise(tokens)]
            rank = min(ranks)
            if rank == len(self._rank):
                break
            tokens = _join(tokens, *self.merges[rank])
        return tokens


def _pieces(text: str) -> list[bytes]:
    return [piece.encode("utf-8", "surrogateescape") for piece in _PIECE.findall(text)]


def _join(tokens: Sequence[bytes], first: bytes, second: bytes) -> list[bytes]:
    """Return ``tokens`` with every pair joined, from the left."""
    found: list[bytes] = []
    place = 0
    while place < len(tokens):
        if place + 1 < len(tokens) and tokens[place] == first and tokens[place + 1] == second:
            found.append(first + second)
            place += 2
        else:
            found.append(tokens[place])
            place += 1
    return found


def _pairs(tokens: Sequence[bytes]) -> Counter[tuple[bytes, bytes]]:
    """Return how many of each pair a merge would join; "lll" holds one pair of "l"."""
    found: Counter[tuple[bytes, bytes]] = Counter()
    run = 0
    for pair in pairwise(tokens):
        run = run + 1 if pair[0] == pair[1] else 0
        if run % 2 == 0 and run:
            continue  # the middle one went to the pair before
        found[pair] += 1
    return found


def train_subword(
    corpus: str,
    *,
    vocab_size: int,
    objective: Literal["likelihood", "frequency"] = "likelihood",
    least: int = 2,
) -> SubwordTokenizer:
    """Return a tokenizer for texts like ``corpus``.

    Args:
        corpus: the text to learn from.
        vocab_size: the most tokens, the 256 bytes among them; fewer where no merge is left that raises the likelihood.
        objective: ``"likelihood"``, or ``"frequency"`` for byte-pair encoding.
        least: pairs that are rarer are not joined.

    Raises:
        BadInput: the corpus is empty, or ``vocab_size`` below 256.
    """
    if vocab_size < 256 or least < 1:
        raise BadInput(f"vocab_size must be at least 256 and least at least 1, got {vocab_size} and {least}")
    if objective not in ("likelihood", "frequency"):
        raise BadInput(f"objective must be 'likelihood' or 'frequency', got {objective!r}")
    words = Counter(_pieces(corpus))
    if not words:
        raise BadInput("corpus must hold at least one sign")
    often = list(words.values())
    split = [[bytes([byte]) for byte in word] for word in words]
    counts: Counter[bytes] = Counter()
    pairs: Counter[tuple[bytes, bytes]] = Counter()
    where: dict[tuple[bytes, bytes], set[int]] = {}
    for number, tokens in enumerate(split):
        for token in tokens:
            counts[token] += often[number]
        for pair, count in _pairs(tokens).items():
            pairs[pair] += count * often[number]
            where.setdefault(pair, set()).add(number)
    merges: list[tuple[bytes, bytes]] = []
    history = [log_likelihood(counts.values())]
    total = sum(counts.values())
    made: set[bytes] = set()
    while 256 + len(made) < vocab_size:
        best = _best(pairs, counts, total, objective, least)
        if best is None:
            break
        for number in sorted(where[best]):
            before, after = split[number], _join(split[number], *best)
            for pair, count in _pairs(before).items():
                pairs[pair] -= count * often[number]
                where[pair].discard(number)
            for pair, count in _pairs(after).items():
                pairs[pair] += count * often[number]
                where.setdefault(pair, set()).add(number)
            for token in before:
                counts[token] -= often[number]
            for token in after:
                counts[token] += often[number]
            total -= (len(before) - len(after)) * often[number]
            split[number] = after
        del pairs[best]
        merges.append(best)
        made.add(best[0] + best[1])
        history.append(log_likelihood(counts.values()))
    kept = {token: count for token, count in counts.items() if count > 0}
    return SubwordTokenizer(
        {**kept, **{token: counts[token] for token in sorted(made)}}, merges, objective=objective, history=history
    )


def _best(
    pairs: Mapping[tuple[bytes, bytes], int],
    counts: Counter[bytes],
    total: int,
    objective: str,
    least: int,
) -> tuple[bytes, bytes] | None:
    """Return the pair to join next; of equal ones the first in the order of their bytes."""
    known = [(pair, count) for pair, count in pairs.items() if count >= least]
    if objective == "frequency":
        return min(known, key=lambda each: (-each[1], each[0]))[0] if known else None
    gains = [
        (-merge_gain(counts[a], counts[b], count, total, same=a == b, joined=counts[a + b]), (a, b))
        for (a, b), count in known
    ]
    if not gains:
        return None
    gain, pair = min(gains)
    return pair if gain < 0 else None
