"""LAMA: rank-one heads by a loop, padding, order, and what a head without a query does."""

from __future__ import annotations

import math

import pytest
import torch

from torchgraft.errors import BadInput
from torchgraft.parts.mixers.lama_compact_attention import Lama, LamaEncoder

DOUBLE = torch.float64


def pooled(**options: bool) -> tuple[Lama, torch.Tensor]:
    torch.manual_seed(0)
    return Lama(6, num_heads=3, **options).to(DOUBLE), torch.randn(2, 5, 6, dtype=DOUBLE)


def test_equals_the_loop_over_heads_and_tokens() -> None:
    layer, x = pooled()
    found = layer(x)
    for b in range(2):
        c = x[b].mean(0)
        f = torch.zeros(3, 5, dtype=DOUBLE)
        for h in range(3):
            affinity = torch.outer(layer.p[:, h], layer.q[:, h])
            for t in range(5):
                f[h, t] = math.tanh(float((c @ affinity @ x[b, t]).detach()))
        f = f / f.norm(dim=0, keepdim=True)
        weights = f.exp() / f.exp().sum(1, keepdim=True)
        assert torch.allclose(found[b], weights @ x[b], atol=1e-12)


@pytest.mark.parametrize("l2", [False, True])
def test_padding_weighs_nothing_and_changes_nothing(l2: bool) -> None:
    layer, x = pooled(l2=l2)
    longer = torch.cat([x, torch.full((2, 3, 6), 9.0, dtype=DOUBLE)], dim=1)
    valid = torch.arange(8).expand(2, -1) < 5
    assert torch.allclose(layer(longer, valid), layer(x), atol=1e-13)
    weights = layer.weights(longer, valid)
    assert torch.equal(weights[..., 5:], torch.zeros(2, 3, 3, dtype=DOUBLE))
    assert torch.allclose(weights.sum(-1), torch.ones(2, 3, dtype=DOUBLE))
    assert bool(layer(longer, torch.zeros(2, 8, dtype=torch.bool)).isfinite().all())


def test_order_does_not_matter() -> None:
    layer, x = pooled()
    order = torch.randperm(5)
    assert torch.allclose(layer(x[:, order]), layer(x), atol=1e-13)
    assert torch.allclose(layer.weights(x[:, order]), layer.weights(x)[..., order], atol=1e-13)


def test_a_head_orthogonal_to_the_context_weighs_all_alike() -> None:
    layer, x = pooled(l2=False)
    with torch.no_grad():
        layer.p[:, 0] = 0.0
    assert torch.allclose(layer.weights(x)[:, 0], torch.full((2, 5), 0.2, dtype=DOUBLE))
    assert not torch.allclose(layer.weights(x)[:, 1], torch.full((2, 5), 0.2, dtype=DOUBLE))


def test_contexts_and_parameters() -> None:
    assert sum(p.numel() for p in Lama(6, num_heads=3).parameters()) == 36
    learned = Lama(6, num_heads=3, context="learned").to(DOUBLE)
    assert sum(p.numel() for p in learned.parameters()) == 42
    x = torch.randn(2, 5, 6, dtype=DOUBLE)
    assert learned.context is not None
    assert torch.allclose(learned(x), learned(x, context=learned.context.expand(2, -1)))
    for options in ({"num_heads": 0}, {"context": "last"}):
        with pytest.raises(BadInput):
            Lama(6, **options)  # type: ignore[arg-type]  # that is the point
    with pytest.raises(BadInput, match="valid"):
        learned(x, torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(BadInput, match="even"):
        LamaEncoder(9, 2, d_model=7)


def test_the_encoder_ignores_trailing_padding() -> None:
    torch.manual_seed(0)
    model = LamaEncoder(20, 3, d_model=8, num_heads=2).eval()
    tokens = torch.randint(1, 20, (2, 6))
    padded = torch.cat([tokens, torch.zeros(2, 4, dtype=torch.long)], dim=1)
    assert torch.allclose(model(padded), model(tokens), atol=1e-6)
