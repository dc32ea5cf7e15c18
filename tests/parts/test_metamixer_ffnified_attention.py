"""FFNified attention: folding, windows, and the template's two known members."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.errors import BadInput
from torchgraft.parts.mixers.metamixer_ffnified_attention import (
    FFBlock,
    FFNet,
    FFNifiedAttention,
    MetaMixer,
    TwoScale,
    folded,
)

DOUBLE = torch.float64


def worn(module: nn.Module) -> nn.Module:
    """Return ``module`` in float64 and eval mode with statistics and gains that are not the first ones."""
    draw = torch.Generator().manual_seed(0)
    module = module.to(DOUBLE)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor in (part.weight.data, part.bias.data, part.running_mean, part.running_var):
                assert tensor is not None
                tensor.copy_(torch.rand(tensor.shape, generator=draw) + 0.3)
    return module.eval()


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: TwoScale(4, 7), (2, 4, 9, 9)),
        (lambda: TwoScale(4, 3), (2, 4, 9, 9)),
        (lambda: FFNifiedAttention(4), (2, 4, 9, 9)),
        (lambda: FFBlock(4, scale=0.5), (2, 4, 9, 9)),
        (lambda: FFNet((4, 6), (1, 2), scale=0.5), (2, 1, 16, 16)),
    ],
)
def test_folded_equals_unfolded(build: object, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    module = worn(build())  # type: ignore[operator]  # they are functions
    x = torch.randn(shape, dtype=DOUBLE)
    plain = folded(module)
    assert torch.allclose(plain(x), module(x), atol=1e-12)
    assert not any(isinstance(part, nn.BatchNorm2d | TwoScale) for part in plain.modules())
    module.train()
    with pytest.raises(BadInput, match="eval"):
        folded(module)


def test_one_pixel_moves_its_window_and_nothing_else() -> None:
    torch.manual_seed(0)
    module = worn(FFNifiedAttention(3, k1=5, k2=3))
    x = torch.randn(1, 3, 15, 15, dtype=DOUBLE)
    other = x.clone()
    other[0, 1, 7, 7] += 1.0
    moved = (module(other) - module(x)).detach().abs().amax((0, 1)) > 0
    window = torch.zeros(15, 15, dtype=torch.bool)
    window[4:11, 4:11] = True  # 5 + 3 - 1 wide
    assert torch.equal(moved, window)


def test_shifts_commute_away_from_the_border() -> None:
    torch.manual_seed(0)
    module = worn(FFNifiedAttention(3, k1=3, k2=3))
    x = torch.randn(1, 3, 12, 12, dtype=DOUBLE)
    rolled = module(x.roll((1, 2), (2, 3))).roll((-1, -2), (2, 3))
    inner = (..., slice(4, 8), slice(4, 8))
    assert torch.allclose(rolled[inner], module(x)[inner], atol=1e-12)


def test_channels_meet_in_the_query_only() -> None:
    torch.manual_seed(0)
    module = worn(FFNifiedAttention(3))
    module.mixer.query = nn.Identity()  # type: ignore[union-attr,assignment]  # that is the point
    x = torch.randn(1, 3, 9, 9, dtype=DOUBLE)
    other = x.clone()
    other[:, 0] += 1.0
    assert torch.equal(module(other)[:, 1:], module(x)[:, 1:])
    assert not torch.equal(module(other)[:, 0], module(x)[:, 0])


class _Times(nn.Module):
    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


def test_the_template_holds_attention_and_feed_forward() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(5, 4, dtype=DOUBLE) for _ in range(3))
    attention = MetaMixer(nn.Identity(), _Times(k.mT / 2.0), lambda s: s.softmax(-1), _Times(v))
    assert torch.allclose(attention(q), F.scaled_dot_product_attention(q[None], k[None], v[None])[0], atol=1e-12)
    first, second = nn.Linear(4, 6), nn.Linear(6, 4)
    x = torch.randn(3, 4)
    assert torch.equal(MetaMixer(nn.Identity(), first, F.gelu, second)(x), second(F.gelu(first(x))))


def test_bad_input() -> None:
    with pytest.raises(BadInput, match="odd"):
        FFNifiedAttention(4, k1=4)
    with pytest.raises(BadInput, match="one length"):
        FFNet((4,), (1, 1))
    with pytest.raises(BadInput, match="shape"):
        FFNifiedAttention(4)(torch.randn(1, 3, 8, 8))
