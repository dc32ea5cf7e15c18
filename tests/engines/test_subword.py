"""Likelihood sub-words: exact gains, merges that never lower the likelihood, Viterbi beside all segmentations."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchgraft.engines.subword import SubwordTokenizer, log_likelihood, merge_gain, train_subword
from torchgraft.errors import BadInput

_TEXT = "the theory of the thing is that these things thin out; then the thinner theories then these aaaa aaa bbbb " * 4


def _counts(pieces: list[list[str]]) -> Counter[str]:
    return Counter(token for piece in pieces for token in piece)


def _joined(piece: list[str], first: str, second: str) -> list[str]:
    found: list[str] = []
    for token in piece:
        if found and found[-1] == first and token == second:
            found[-1] = first + second
        else:
            found.append(token)
    return found


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("ab", min_size=1, max_size=8), min_size=1, max_size=5), st.sampled_from(["ab", "ba", "aa"]))
def test_the_gain_is_the_difference_of_two_likelihoods(words: list[str], pair: str) -> None:
    before = [list(word) for word in words]
    after = [_joined(piece, *pair) for piece in before]
    old, new = _counts(before), _counts(after)
    pairs = new[pair]
    gain = merge_gain(old[pair[0]], old[pair[1]], pairs, old.total(), same=pair[0] == pair[1])
    expected = log_likelihood(new.values()) - log_likelihood(old.values())
    assert gain == pytest.approx(expected, abs=1e-9)


def test_every_merge_raises_the_likelihood_of_the_segmented_corpus() -> None:
    made = train_subword(_TEXT, vocab_size=300)
    assert len(made) > 280
    pieces = [[bytes([byte]) for byte in piece] for piece in _split(_TEXT)]
    for (first, second), known, after in zip(made.merges, made.history[:-1], made.history[1:], strict=True):
        now = Counter(token for piece in pieces for token in piece)
        assert known == pytest.approx(log_likelihood(now.values()))
        best = max(_gain(pieces, pair) for pair in {p for piece in pieces for p in itertools.pairwise(piece)})
        assert after - known == pytest.approx(best)  # none of the others would have raised it more
        assert after > known
        pieces = [_bytes_joined(piece, first, second) for piece in pieces]


def _split(text: str) -> list[bytes]:
    import re

    return [piece.encode() for piece in re.findall(r"\s?\w+|\s?[^\w\s]+|\s+", text)]


def _bytes_joined(piece: list[bytes], first: bytes, second: bytes) -> list[bytes]:
    found: list[bytes] = []
    whole = False  # whether the last token was just made and may not be joined again
    for token in piece:
        if found and not whole and found[-1] == first and token == second:
            found[-1], whole = first + second, True
        else:
            found.append(token)
            whole = False
    return found


def _gain(pieces: list[list[bytes]], pair: tuple[bytes, bytes]) -> float:
    old = Counter(token for piece in pieces for token in piece)
    new = Counter(token for piece in pieces for token in _bytes_joined(piece, *pair))
    if new[pair[0] + pair[1]] - old[pair[0] + pair[1]] < 2:
        return -math.inf
    return log_likelihood(new.values()) - log_likelihood(old.values())


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=1, max_size=10).map(lambda raw: bytes(97 + byte % 3 for byte in raw)))
def test_viterbi_equals_the_best_of_all_segmentations(piece: bytes) -> None:
    counts = {b"a": 5, b"b": 3, b"c": 1, b"ab": 4, b"bc": 2, b"abc": 3, b"aa": 2, b"cab": 1, b"bbb": 1}
    made = SubwordTokenizer(counts)
    best = -math.inf
    for cuts in itertools.product([False, True], repeat=len(piece) - 1):
        places = [0, *(place + 1 for place, cut in enumerate(cuts) if cut), len(piece)]
        tokens = [piece[begin:end] for begin, end in itertools.pairwise(places)]
        if all(token in made.log_probability for token in tokens):
            best = max(best, sum(made.log_probability[token] for token in tokens))
    found = made.viterbi(piece)
    assert b"".join(found) == piece
    assert sum(made.log_probability[token] for token in found) == pytest.approx(best)


def test_byte_pair_encoding_joins_the_most_frequent_pair() -> None:
    made = train_subword(
        "low low low low low lower lower newest newest newest newest newest newest widest widest widest",
        vocab_size=260,
        objective="frequency",
    )  # the classic example, with spaces before words
    assert [first + second for first, second in made.merges] == [b"es", b"est", b"lo", b"low"]
    assert made.merged(b"lowest") == [b"low", b"est"]
    frequent = train_subword(_TEXT, vocab_size=300, objective="frequency")
    assert frequent.merges != train_subword(_TEXT, vocab_size=300).merges


@settings(max_examples=25, deadline=None)
@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    for made in _MADE:
        numbers = made.encode(text)
        assert made.decode(numbers) == text
        assert all(0 <= number < len(made) for number in numbers)


_MADE = [train_subword(_TEXT, vocab_size=290, objective=objective) for objective in ("likelihood", "frequency")]


def test_probabilities_are_the_frequencies() -> None:
    made = SubwordTokenizer({b"a": 3, b"ab": 1})
    total = 3 + 1 + 255 * 0.5
    assert made.log_probability[b"a"] == pytest.approx(math.log(3 / total))
    assert sum(map(math.exp, made.log_probability.values())) == pytest.approx(1)
    assert len(made) == 257


def test_what_cannot_be_used_is_refused() -> None:
    with pytest.raises(BadInput, match="vocab_size"):
        train_subword("abc", vocab_size=10)
    with pytest.raises(BadInput, match="corpus"):
        train_subword("", vocab_size=300)
    with pytest.raises(BadInput, match="objective"):
        train_subword("abc", vocab_size=300, objective="speed")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="below 257"):
        SubwordTokenizer({b"ab": 1}).decode([257])
