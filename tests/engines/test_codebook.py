"""Codebooks: each function against a loop or a case by hand, in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchgraft.engines.codebook import (
    Codebook,
    assigned,
    ema_update,
    kmeans,
    kmeans_plus_plus,
    lookup,
    means,
    nearest_code,
    reseeded,
    similarities,
    straight_through,
    topk_codes,
    usage,
)
from torchgraft.errors import BadInput


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_hand(x: Tensor, codes: Tensor, similarity: str) -> Tensor:
    """Return the similarities of one codebook by loops."""
    if similarity == "euclid":
        return torch.stack(
            [torch.stack([-sum((a - b) ** 2 for a, b in zip(r, c, strict=True)) for c in codes]) for r in x]
        )
    return torch.stack([torch.stack([(r @ c) / (r.norm() * c.norm()) for c in codes]) for r in x])


@pytest.mark.parametrize("similarity", ["euclid", "cosine"])
def test_similarities_by_hand_for_several_codebooks(similarity: str) -> None:
    x, codes = draw(3, 5, 4), draw(3, 6, 4, seed=1)
    expected = torch.stack([by_hand(a, b, similarity) for a, b in zip(x, codes, strict=True)])
    torch.testing.assert_close(similarities(x, codes, similarity=similarity), expected, rtol=0, atol=1e-12)
    found = nearest_code(x, codes, similarity=similarity, chunk=2)
    assert torch.equal(found, expected.argmax(-1))
    top = topk_codes(x, codes, 3, similarity=similarity, chunk=2)
    assert torch.equal(top, expected.argsort(-1, descending=True)[..., :3])
    assert torch.equal(top[..., 0], found)


def test_nearest_is_found_far_from_the_origin_in_float32() -> None:
    codes = (1e4 + torch.arange(50.0) / 64)[:, None].expand(-1, 3)
    x = codes + 0.003
    assert torch.equal(nearest_code(x, codes), torch.arange(50))
    plain = ((codes * codes).sum(-1) - 2 * x @ codes.T).argmin(-1)  # what rounding does without the care
    assert not torch.equal(plain, torch.arange(50))


def test_nearest_is_found_far_from_the_origin_in_float64() -> None:
    codes = (1e9 + torch.arange(50.0, dtype=torch.float64) / 64)[:, None].expand(-1, 3)
    assert torch.equal(nearest_code(codes + 0.003, codes), torch.arange(50))


def test_first_of_equals_and_zeros() -> None:
    codes = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert nearest_code(torch.tensor([[2.0, 0.0]]), codes).item() == 0
    assert torch.equal(similarities(torch.zeros(1, 2), codes, similarity="cosine"), torch.zeros(1, 3).double())
    assert nearest_code(torch.zeros(0, 2), codes).shape == (0,)


def test_cosine_ignores_lengths_and_euclid_does_not() -> None:
    codes = torch.tensor([[10.0, 0.0], [0.0, 0.5]])
    x = torch.tensor([[0.5, 0.4]])
    assert nearest_code(x, codes, similarity="cosine").item() == 0
    assert nearest_code(x, codes, similarity="euclid").item() == 1


def test_lookup_takes_rows_and_their_gradient() -> None:
    codes, indices = draw(2, 4, 3).requires_grad_(), torch.tensor([[3, 0, 3], [1, 1, 2]])
    rows = lookup(codes, indices)
    assert torch.equal(rows, torch.stack([codes[g][indices[g]] for g in range(2)]))
    rows.sum().backward()
    counts = torch.tensor([[1.0, 0.0, 0.0, 2.0], [0.0, 2.0, 1.0, 0.0]]).double()
    assert codes.grad is not None
    assert torch.equal(codes.grad, counts[..., None].expand(-1, -1, 3))


def test_straight_through_is_exact_forward_and_backward() -> None:
    x, q = (1e6 * draw(4, 3)).float().requires_grad_(), draw(4, 3, seed=1).float().requires_grad_()
    out = straight_through(x, q)
    assert torch.equal(out, q)
    upstream = draw(4, 3, seed=2).float()
    out.backward(upstream)
    assert x.grad is not None
    assert q.grad is not None
    assert torch.equal(x.grad, upstream)
    assert torch.equal(q.grad, upstream)


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 9))
@settings(max_examples=25, deadline=None)
def test_assigned_equals_a_loop(seed: int, groups: int, n: int) -> None:
    x = draw(groups, 7, 2, seed=seed)
    indices = torch.randint(n, (groups, 7), generator=seeded(seed))
    counts, sums = assigned(x, indices, n)
    for g in range(groups):
        for i in range(n):
            mask = indices[g] == i
            assert counts[g, i] == mask.sum()
            torch.testing.assert_close(sums[g, i], x[g][mask].sum(0), rtol=0, atol=1e-12)


def test_statistics_are_float32_for_bfloat16() -> None:
    counts, sums = assigned(torch.ones(1000, 1, dtype=torch.bfloat16), torch.zeros(1000, dtype=torch.long), 1)
    assert counts.dtype == sums.dtype == torch.float32
    assert counts.item() == sums.item() == 1000  # bfloat16 would stop at 256


def test_ema_by_hand_and_its_limit_is_the_batch_mean() -> None:
    x, indices = torch.tensor([[1.0], [3.0], [10.0]]).double(), torch.tensor([0, 0, 1])
    counts, sums = torch.tensor([4.0, 2.0, 1.0]).double(), torch.tensor([[8.0], [2.0], [5.0]]).double()
    codes = sums / counts[:, None]
    n, m = ema_update(counts, sums, *assigned(x, indices, 3), decay=0.75)
    torch.testing.assert_close(n, torch.tensor([3.5, 1.75, 0.75]).double())
    torch.testing.assert_close(m[:, 0], torch.tensor([7.0, 4.0, 3.75]).double())
    torch.testing.assert_close(means(codes, n, m)[:, 0], torch.tensor([2.0, 16 / 7, 5.0]).double())
    # With no memory the codes are the means of their vectors: one round of k-means; an idle code stays.
    n, m = ema_update(counts, sums, *assigned(x, indices, 3), decay=0.0)
    torch.testing.assert_close(means(codes, n, m)[:, 0], torch.tensor([2.0, 10.0, 5.0]).double())


def test_kmeans_plus_plus_takes_every_row_once() -> None:
    x = draw(20, 2)
    codes = kmeans_plus_plus(x, 20, generator=seeded())
    assert sorted(map(tuple, codes.tolist())) == sorted(map(tuple, x.tolist()))
    assert kmeans_plus_plus(x[:3], 5, generator=seeded()).shape == (5, 2)


def test_kmeans_finds_separate_clusters() -> None:
    centres = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0], [9.0, 9.0]]).double()
    x = (centres[:, None] + 0.1 * draw(4, 25, 2)).flatten(0, 1)
    found = kmeans(x, 4, generator=seeded())
    expected = x.reshape(4, 25, 2).mean(1)
    torch.testing.assert_close(found[nearest_code(expected, found)], expected, rtol=0, atol=1e-12)


@given(st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_a_round_of_kmeans_never_raises_the_error(seed: int) -> None:
    x = draw(30, 2, seed=seed)

    def error(steps: int) -> float:
        return float(-similarities(x, kmeans(x, 5, steps=steps, generator=seeded(seed))).amax(-1).sum())

    errors = [error(steps) for steps in range(4)]
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(errors))


def test_reseeded_touches_only_the_dead() -> None:
    codes, x = draw(2, 5, 3), draw(2, 4, 3, seed=1)
    dead = torch.tensor([[True, False, False, True, False], [False] * 5])
    found = reseeded(codes, dead, x, generator=seeded())
    assert torch.equal(found[~dead], codes[~dead])
    rows = [bool((row == x[0]).all(-1).any()) for row in found[0, dead[0]]]
    assert rows == [True, True]
    assert not torch.equal(found[0, 0], found[0, 3])
    noisy = reseeded(codes, dead, x, noise=0.1, generator=seeded())
    assert torch.equal(noisy[~dead], codes[~dead])
    assert not torch.equal(noisy[dead], found[dead])
    with pytest.raises(BadInput, match="re-seeded"):
        reseeded(codes, dead, x[:, :0])


def test_usage_by_hand() -> None:
    found = usage(torch.tensor([[0, 0, 1, 1], [2, 2, 2, 2]]), 4, groups=1)
    assert found.counts.tolist() == [[2, 2, 0, 0], [0, 0, 4, 0]]
    assert found.used.tolist() == [0.5, 0.25]
    torch.testing.assert_close(found.perplexity, torch.tensor([2.0, 1.0]))
    assert usage(torch.zeros(0, dtype=torch.long), 3).perplexity.item() == 0
    assert math.isclose(usage(torch.arange(6).reshape(2, 3), 6).perplexity.item(), 6, rel_tol=1e-6)


def test_codebook_update_is_the_running_mean() -> None:
    book = Codebook(3, 2, groups=2, decay=0.9).double()
    x = draw(2, 40, 2)
    book.start_(x, generator=seeded())
    counts, sums = book.counts.clone(), book.sums.clone()
    torch.testing.assert_close(means(book.codes, counts, sums), book.codes)
    batch = draw(2, 6, 2, seed=3)
    indices = book.update_(batch)
    for g in range(2):
        for i in range(3):
            mine = batch[g][indices[g] == i]
            n, m = 0.9 * counts[g, i] + 0.1 * len(mine), 0.9 * sums[g, i] + 0.1 * mine.sum(0)
            torch.testing.assert_close(book.codes[g, i], m / n)
    assert book.idle.eq(0).sum() == usage(indices, 3, groups=1).counts.gt(0).sum()


def test_codebook_reseeds_idle_codes_only() -> None:
    book = Codebook(3, 1, decay=0.5)
    book.codes.copy_(torch.tensor([[0.0], [1.0], [100.0]]))
    x = torch.tensor([[0.1], [0.9]])
    for _ in range(3):
        book.update_(x)
    kept = book.codes.clone()
    assert book.idle.tolist() == [0, 0, 3]
    assert book.reseed_(x, after=4).any().item() is False
    assert book.reseed_(x, after=3, generator=seeded()).tolist() == [False, False, True]
    assert torch.equal(book.codes[:2], kept[:2])
    assert book.codes[2].item() in {value.item() for value in x.flatten()}
    assert book.idle.tolist() == [0, 0, 0]
    torch.testing.assert_close(means(kept, book.counts, book.sums), book.codes)


def test_codebook_forward_does_not_learn() -> None:
    book = Codebook(4, 2)
    x = torch.randn(6, 2, requires_grad=True)
    before = {name: value.clone() for name, value in book.state_dict().items()}
    quantized, indices = book(x)
    quantized.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))
    assert torch.equal(quantized, book.codes[indices])
    assert all(torch.equal(value, before[name]) for name, value in book.state_dict().items())
    assert not list(book.parameters())


@pytest.mark.parametrize(
    "call",
    [
        lambda: Codebook(0, 2),
        lambda: Codebook(2, 0),
        lambda: Codebook(2, 2, groups=0),
        lambda: Codebook(2, 2, decay=1.0),
        lambda: topk_codes(torch.zeros(1, 2), torch.zeros(3, 2), 4),
        lambda: topk_codes(torch.zeros(1, 2), torch.zeros(3, 2), 0),
        lambda: nearest_code(torch.zeros(1, 3), torch.zeros(3, 2)),
        lambda: nearest_code(torch.zeros(1, 2), torch.zeros(3, 2), similarity="dot"),  # type: ignore[arg-type]
        lambda: assigned(torch.zeros(3, 2), torch.zeros(2, dtype=torch.long), 4),
        lambda: lookup(torch.zeros(2, 3, 1), torch.zeros(3, dtype=torch.long)),
        lambda: kmeans_plus_plus(torch.zeros(0, 2), 1),
        lambda: ema_update(*(torch.zeros(1),) * 4, decay=-0.1),
    ],
)
def test_bad_input_is_refused(call: object) -> None:
    assert callable(call)
    with pytest.raises(BadInput):
        call()
