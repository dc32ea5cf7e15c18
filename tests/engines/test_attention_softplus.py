"""The softplus of the pipeline: as accurate in place as torch's own, and sums without absolute values."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from torchgraft.engines.attention import (
    L1,
    Reweighted,
    attend,
    attention_weights,
    blocked,
    l1,
    softplus,
)
from torchgraft.engines.attention.rows import Rows


def _rows(count: int, *, overwrite: bool) -> Rows:
    place = torch.arange(count)
    return Rows(slice(0, 1), slice(0, count), place[:1], place, overwrite=overwrite)


@pytest.mark.parametrize(
    ("least", "most"), [(-6.9, 79.0), (-27.0, 79.0), (-86.9, 60.0), (-40.0, 500.0), (-300.0, -0.1)]
)
def test_in_place_is_as_accurate_as_torch(least: float, most: float) -> None:
    s = torch.linspace(least, most, 40_001)[None, None, None]
    wanted = F.softplus(s.double(), threshold=700.0)
    found = softplus(s.clone(), _rows(40_001, overwrite=True)).double()
    normal = s > -86.9  # below, float32 has no numbers of full precision
    assert ((found - wanted).abs() / wanted)[normal].max() < 1e-6
    assert (found[~normal] < 2e-38).all()


def test_double_precision_is_torchs_own() -> None:
    s = torch.linspace(-60.0, 60.0, 1_001, dtype=torch.float64)[None, None, None]
    assert torch.equal(softplus(s.clone(), _rows(1_001, overwrite=True)), F.softplus(s))


def test_it_writes_only_where_it_may() -> None:
    s = torch.randn(1, 1, 1, 8)
    kept = s.clone()
    plain = softplus(s, _rows(8, overwrite=False))
    assert torch.equal(s, kept)
    assert torch.equal(plain, F.softplus(kept))
    written = softplus(s, _rows(8, overwrite=True))
    assert written.data_ptr() == s.data_ptr()
    torch.testing.assert_close(written, plain, rtol=1e-6, atol=0.0)


def test_no_key_and_what_is_no_number_pass_through() -> None:
    assert softplus(torch.zeros(1, 1, 1, 0), _rows(0, overwrite=True)).shape == (1, 1, 1, 0)
    strange = torch.tensor([[[[float("nan"), 1.0, float("inf"), -float("inf")]]]])
    found = softplus(strange, _rows(4, overwrite=True)).flatten()
    assert found.isnan().tolist() == [True, False, False, False]
    assert found[2].isinf()
    assert found[3] < 2e-38


def test_blocks_without_a_gradient_equal_the_matrix() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 50, 2, 8) for _ in range(3))
    wanted = attend(q, k, v, transform=softplus, normalize=l1, causal=True, form="dense")
    with torch.no_grad():
        for normalize in (l1, L1(signed=False)):
            found = attend(q, k, v, transform=softplus, normalize=normalize, causal=True, form="blocks", rows=16)
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_what_is_hidden_is_zero_in_the_pass_that_sums() -> None:
    place = torch.arange(5)
    seen = torch.ones(3, 3, dtype=torch.bool).tril()
    rows = Rows(slice(2, 5), slice(0, 5), place[2:], place, seen=seen, edge=2, overwrite=True)
    s = torch.randn(1, 2, 3, 5)
    wanted = F.softplus(s.double()) * torch.cat([torch.ones(3, 2), seen], dim=1)
    weights, sums = l1.parts_after(softplus, s.clone(), rows)
    torch.testing.assert_close(weights.double(), wanted, rtol=1e-6, atol=0.0)
    assert ((weights == 0) == (wanted == 0)).all()
    torch.testing.assert_close(sums.double(), wanted.sum(-1, keepdim=True), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("per_head", [False, True])
def test_heads_one_after_another_equal_the_matrix(monkeypatch: pytest.MonkeyPatch, per_head: bool) -> None:
    monkeypatch.setattr(blocked, "_AREA", 1 << 12)
    monkeypatch.setattr(blocked, "_LEAST_ROWS", 4)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 50, 3, 8) for _ in range(3))
    mask = torch.rand(2, 3, 50, 50) > 0.3 if per_head else torch.rand(2, 50) > 0.3
    mask[..., 0] = True
    widths = []

    def noted(s: torch.Tensor, rows: Rows) -> torch.Tensor:
        widths.append(s.shape[1])
        return F.softplus(s)

    for transform, heads in ((softplus, 1), (noted, 3)):  # of a stranger it is not known whether heads are alike
        wanted = attend(q, k, v, transform=transform, normalize=l1, mask=mask, causal=True, form="dense")
        widths.clear()
        with torch.no_grad():
            found = attend(q, k, v, transform=transform, normalize=l1, mask=mask, causal=True, form="blocks")
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        assert set(widths) <= {heads}
    assert widths


def test_signs_count_unless_there_are_none() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 6, 1, 4), torch.randn(1, 6, 1, 4)
    weights = attention_weights(q, k, normalize=L1(signed=True))
    assert (weights < 0).any()
    torch.testing.assert_close(weights.abs().sum(-1), torch.ones(1, 1, 6))
    unsigned = attention_weights(q, k, normalize=l1)
    torch.testing.assert_close(unsigned.sum(-1), torch.ones(1, 1, 6), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("power", [1.0, 3.0, 15.0])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_reweighting_in_place_equals_the_matrix(power: float, offset: float) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 50, 2, 8) for _ in range(3))
    normalize = Reweighted(L1(signed=False), power=power, offset=offset)
    wanted = attend(q, k, v, transform=softplus, normalize=normalize, causal=True, form="dense")
    with torch.no_grad():
        found = attend(q, k, v, transform=softplus, normalize=normalize, causal=True, form="blocks", rows=16)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_hidden_scores_of_several_sequences_and_heads_are_zero(threads: int) -> None:
    before = torch.get_num_threads()
    place = torch.arange(5)
    seen = torch.tensor([[True, False], [False, True], [True, True]])
    rows = Rows(slice(2, 5), slice(0, 5), place[2:], place, seen=seen.mT.contiguous().mT, edge=3, overwrite=True)
    s = torch.randn(2, 3, 3, 5)
    wanted = F.softplus(s.double()) * torch.cat([torch.ones(3, 3), seen], dim=1)
    s[..., 0, 4] = float("inf")  # hidden
    try:
        torch.set_num_threads(threads)
        weights, sums = l1.parts_after(softplus, s, rows)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(weights.double(), wanted, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(sums.double(), wanted.sum(-1, keepdim=True), rtol=1e-6, atol=0.0)
