"""Activator: the gate by hand, tokens that never meet, block B as a special case of A, and counts by formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.meters.counts import macs, params
from torchgraft.errors import BadInput
from torchgraft.parts.linears.activator_glu import ActivatorBlock, ActivatorViT, GatedUnit, token_macs


def shaken(module: nn.Module, seed: int = 0) -> nn.Module:
    """Return ``module`` in float64 with every parameter drawn anew, so that no scale is one and no shift zero."""
    g = torch.Generator().manual_seed(seed)
    module.double().eval()
    with torch.no_grad():
        for value in module.parameters():
            value.copy_(torch.randn(value.shape, generator=g, dtype=torch.float64) * 0.5)
    return module


def normed(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shared", [True, False])
def test_gate_equals_the_equation(shared: bool) -> None:
    unit = shaken(GatedUnit(6, hidden=9, shared_norm=shared))
    x = draw(2, 4, 6)
    p = dict(unit.named_parameters())
    up = x @ p["gate.weight"].T + p["gate.bias"]
    u = normed(0.5 * up * (1 + torch.erf(up / 2**0.5)), unit.norm)
    v = normed(x @ p["value.weight"].T + p["value.bias"], unit.norm if shared else unit.value_norm)
    torch.testing.assert_close(unit(x), (u * v) @ p["out.weight"].T + p["out.bias"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("ffn", [True, False])
def test_tokens_do_not_see_each_other(ffn: bool) -> None:
    block = shaken(ActivatorBlock(6, hidden=9, ffn=ffn))
    x = draw(1, 4, 6)
    jacobian = torch.autograd.functional.jacobian(lambda x: block(x)[0], x)[:, :, 0]  # (T, D, T, D)
    for i in range(4):
        for j in range(4):
            size = float(jacobian[i, :, j].abs().max())
            assert (size > 0.1) if i == j else (size == 0.0)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(block(x[:, order]), block(x)[:, order], rtol=0, atol=1e-12)


def test_constant_value_branch_leaves_a_normalised_mlp() -> None:
    unit = shaken(GatedUnit(6, hidden=9))
    with torch.no_grad():
        unit.value.weight.zero_()
    x = draw(2, 4, 6)
    scale = normed(unit.value.bias, unit.norm)  # LN(b_2)
    mlp = normed(F.gelu(unit.gate(x)), unit.norm) @ (unit.out.weight * scale).T + unit.out.bias
    torch.testing.assert_close(unit(x), mlp, rtol=0, atol=1e-12)


def test_block_b_is_block_a_whose_feed_forward_part_says_nothing() -> None:
    a = shaken(ActivatorBlock(6, hidden=9))
    b = ActivatorBlock(6, hidden=9, ffn=False).double().eval()
    b.load_state_dict({name: value for name, value in a.state_dict().items() if not name.startswith("ffn.")})
    x = draw(2, 4, 6)
    assert float((a(x) - b(x)).detach().abs().max()) > 0.1
    with torch.no_grad():
        a.ffn[3].weight.zero_()
        a.ffn[3].bias.zero_()
    assert torch.equal(a(x), b(x))


def test_the_norm_before_both_parts_is_one_unless_asked() -> None:
    shared, apart = ActivatorBlock(6), ActivatorBlock(6, shared_norm=False)
    assert shared.ffn_norm is None
    assert shared.gated.value_norm is None
    assert params(apart) - params(shared) == 2 * 6 + 2 * 12


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.booleans(), st.integers(1, 9))
def test_counts_equal_the_formulas(width: int, hidden: int, ffn: bool, tokens: int) -> None:
    block = ActivatorBlock(width, hidden=hidden, ffn=ffn).eval()
    gate = 3 * width * hidden + 4 * hidden + width
    rest = 2 * width * hidden + hidden + width if ffn else 0
    assert params(block) == gate + rest + 2 * width
    assert macs(block, torch.randn(2, tokens, width)) == 2 * tokens * token_macs(width, hidden, ffn=ffn)


def test_whole_model_is_a_bag_of_patches_unless_positions_are_asked_for() -> None:
    torch.manual_seed(0)
    image = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    patches = image.unfold(2, 2, 2).unfold(3, 2, 2).flatten(2, 3)  # (B, 1, T, 2, 2)
    mixed = patches[:, :, torch.randperm(16)].unflatten(2, (4, 4)).transpose(3, 4).reshape(3, 1, 8, 8)
    bag = ActivatorViT(2, d_model=8, depth=2, channels=1).double().eval()
    torch.testing.assert_close(bag(mixed), bag(image), rtol=0, atol=1e-12)
    placed = ActivatorViT(2, d_model=8, depth=2, channels=1, tokens=16).double().eval()
    assert float((placed(mixed) - placed(image)).detach().abs().max()) > 1e-3
    assert bag.training is False
    assert ActivatorViT().patch.weight.shape == (256, 3, 4, 4)


def test_dropout_acts_in_training_only() -> None:
    block, x = ActivatorBlock(6, dropout=0.5), torch.randn(2, 4, 6)
    torch.manual_seed(0)
    assert not torch.equal(block.train()(x), block(x))
    assert torch.equal(block.eval()(x), block(x))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: GatedUnit(6, hidden=0), "hidden must be at least 1, got 0"),
        (lambda: ActivatorBlock(6, dropout=1.0), "dropout must be in"),
        (lambda: ActivatorViT(0), "patch must be at least 1"),
        (lambda: ActivatorViT(2, tokens=0), "tokens must be at least 1"),
        (lambda: ActivatorViT(2, channels=1)(torch.zeros(1, 1, 7, 8)), r"in steps of 2, got \(1, 1, 7, 8\)"),
        (lambda: ActivatorViT(2, channels=1, tokens=16)(torch.zeros(1, 1, 8, 16)), "must have 16 patches, got 32"),
    ],
)
def test_bad_input(make, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(BadInput, match=words):
        make()
