"""The softplus of the pipeline: as accurate in place as torch's own, and sums without absolute values."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from torchgraft.engines.attention import L1, Reweighted, attend, attention_weights, l1, softplus
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
