"""SLAB: the schedule from layer norm to RepBN, RepBN beside torch's batch norm, folding, and the ReLU attention."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft import fold
from torchgraft.bench.models import VisionTransformer
from torchgraft.errors import BadInput
from torchgraft.parts.norms.slab_prepbn import (
    PRepBN,
    RepBN,
    SimplifiedLinearAttention,
    convert_ln,
    relu_attention,
)

D = 5


def _moved(module: nn.Module) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for value in module.parameters():
            value.add_(0.3 * torch.randn_like(value))
    return module.double()


class _ByHand(nn.Module):
    """BatchNorm1d on tokens as rows, plus eta x."""

    def __init__(self, norm: RepBN) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(norm.channels, eps=norm.eps, momentum=norm.momentum).double()
        state = {name: value for name, value in norm.state_dict().items() if name != "eta"}
        self.norm.load_state_dict(state)
        self.eta = nn.Parameter(norm.eta.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x.reshape(-1, x.shape[-1])).view(x.shape) + self.eta * x
        return y


def _gradients(module: nn.Module, x: Tensor, parameters: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    x = x.clone().requires_grad_()
    out = module(x)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=out.dtype)
    return out.detach(), list(torch.autograd.grad((out * weight).sum(), [x, *parameters]))


@settings(max_examples=15, deadline=None)
@given(batch=st.integers(1, 4), tokens=st.integers(2, 7), seed=st.integers(0, 50), offset=st.floats(-20, 20))
def test_repbn_is_batch_norm_plus_eta_x(batch: int, tokens: int, seed: int, offset: float) -> None:
    norm = _moved(RepBN(D)).train()
    hand = _ByHand(norm).train()
    torch.manual_seed(seed)
    for training in (True, True, False):
        x = torch.randn(batch, tokens, D).double() + offset
        for each in (norm, hand):
            each.train(training)
        found, expected = (
            _gradients(norm, x, [norm.weight, norm.bias, norm.eta]),
            _gradients(hand, x, [hand.norm.weight, hand.norm.bias, hand.eta]),
        )
        torch.testing.assert_close(found[0], expected[0], rtol=1e-9, atol=1e-9)
        for a, b in zip(found[1], expected[1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(norm.get_buffer(name), hand.norm.get_buffer(name))


def test_the_schedule_by_hand() -> None:
    norm = _moved(PRepBN(D, steps=4)).train()
    twin = copy.deepcopy(norm.rep).train()
    for step in range(6):
        x = torch.randn(3, 4, D).double()
        lam = max(0.0, 1 - step / 4)
        assert norm.lam == lam
        token, rep = F.layer_norm(x, (D,), norm.weight, norm.bias, norm.eps), twin(x)
        out = norm(x)
        if lam in (0.0, 1.0):
            assert torch.equal(out, token if lam == 1.0 else rep)
        torch.testing.assert_close(out, lam * token + (1 - lam) * rep, rtol=0, atol=1e-12)
        assert torch.equal(norm.eval()(x), twin.eval()(x)), "evaluation is RepBN at every step"
        norm.train(), twin.train()
    assert int(norm.step) == 6
    assert PRepBN(D, steps=0).lam == 0.0


def test_the_step_is_kept_in_the_state() -> None:
    norm = PRepBN(D, steps=4)
    norm(torch.randn(2, 3, D))
    other = PRepBN(D, steps=4)
    other.load_state_dict(norm.state_dict())
    assert other.lam == norm.lam == 0.75


def test_repbn_folds_into_the_linear_layer_behind_it() -> None:
    norm = _moved(RepBN(D)).train()
    norm(torch.randn(4, 6, D).double() * 3 + 1)
    norm.eval()
    linear = nn.Linear(D, 3, bias=False).double()
    x = torch.randn(2, 6, D).double()
    expected = linear(norm(x)).detach()
    torch.testing.assert_close(norm.fold_into(copy.deepcopy(linear))(x).detach(), expected, rtol=0, atol=1e-12)
    scale, shift = norm.channel_affine()
    torch.testing.assert_close(norm(x), scale * x + shift)
    with pytest.raises(BadInput, match="of 5 input channels is needed"):
        norm.fold_into(nn.Linear(4, 2))


def test_a_converted_vision_transformer_folds_to_no_norms() -> None:
    torch.manual_seed(0)
    model: Any = VisionTransformer(d_model=16, depth=2, num_heads=2).double()
    nn.init.normal_(model.blocks[0].norm1.weight)
    gain = model.blocks[0].norm1.weight.detach().clone()
    start, x = copy.deepcopy(model), torch.randn(8, 1, 8, 8).double()
    convert_ln(model, steps=3).train()
    torch.testing.assert_close(model(x), start(x), rtol=0, atol=1e-12)  # at step 0 it is layer norm
    assert torch.equal(model.blocks[0].norm1.rep.weight.detach(), gain)
    for _ in range(5):
        model(torch.randn(8, 1, 8, 8).double())
    model.eval()
    before = model(x).detach()
    fold(model, x)
    assert not [m for m in model.modules() if isinstance(m, PRepBN | RepBN | nn.LayerNorm)]
    torch.testing.assert_close(model(x).detach(), before, rtol=0, atol=1e-11)
    assert torch.equal(model(x).argmax(-1), before.argmax(-1))


def test_hugging_faces_vit_is_converted() -> None:
    from transformers import ViTConfig, ViTModel

    sizes: Any = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model: Any = ViTModel(ViTConfig(image_size=8, patch_size=4, num_channels=1, **sizes)).double()
    convert_ln(model, steps=1).train()
    x = torch.randn(4, 1, 8, 8).double()
    for _ in range(3):
        model(x)
    model.eval()
    with torch.no_grad():
        before = model(x).last_hidden_state
        fold(model, x)
        torch.testing.assert_close(model(x).last_hidden_state, before, rtol=0, atol=1e-11)
    assert sum(isinstance(m, nn.Identity) for m in model.modules()) >= 4


def test_both_orders_of_the_products_agree() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 9, 3, 4, dtype=torch.float64) for _ in range(3))
    first, second = (relu_attention(q, k, v, tokens_first=order) for order in (True, False))
    torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(relu_attention(q, k, v), second, rtol=1e-10, atol=1e-12)
    weights = torch.einsum("bthk,bshk->bhts", q.relu(), k.relu())
    rows = weights / (weights.sum(-1, keepdim=True) + 1e-6)
    assert (rows >= 0).all()
    alive = weights.sum(-1) > 0.1
    torch.testing.assert_close(rows.sum(-1)[alive], torch.ones(int(alive.sum())).double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.einsum("bhts,bshv->bthv", rows, v), second, rtol=1e-9, atol=1e-12)
    assert alive.any()


def test_without_dwc_an_output_lies_among_the_values_and_with_it_the_neighbourhood_is_added() -> None:
    torch.manual_seed(0)
    mixer = SimplifiedLinearAttention(8, num_heads=2, dwc=3, grid=(3, 4)).double()
    nn.init.normal_(mixer.position)
    with torch.no_grad():
        mixer.out.weight.copy_(torch.eye(8))
    x = torch.randn(2, 12, 8).double()
    whole = mixer(x)
    v = mixer.value(x)
    image = v.transpose(1, 2).reshape(2, 8, 3, 4)
    kernel, bias = mixer.dwc.weight.repeat(2, 1, 1, 1), mixer.dwc.bias.repeat(2)  # type: ignore[union-attr]
    near = F.conv2d(image, kernel, bias, padding=1, groups=8).flatten(2).transpose(1, 2)
    with torch.no_grad():
        mixer.dwc.weight.zero_()
        mixer.dwc.bias.zero_()  # type: ignore[union-attr]
    alone = mixer(x)
    torch.testing.assert_close(whole - alone, near, rtol=0, atol=1e-12)
    assert (alone <= v.max(1, keepdim=True).values.clamp(min=0) + 1e-9).all()
    assert (alone >= v.min(1, keepdim=True).values.clamp(max=0) - 1e-9).all()


def test_attention_learns_and_takes_no_tokens() -> None:
    mixer = SimplifiedLinearAttention(8, num_heads=2, grid=(2, 3))
    mixer(torch.randn(2, 6, 8)).square().mean().backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in mixer.parameters())
    assert mixer(torch.randn(0, 6, 8)).shape == (0, 6, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PRepBN(4, steps=-1), "steps must be at least 0, got -1"),
        (lambda: convert_ln(nn.Linear(2, 2), steps=1), "no module of Linear matches"),
        (lambda: RepBN(4)(torch.randn(1, 1, 4)), "more than one value a channel"),
        (lambda: SimplifiedLinearAttention(8, num_heads=2, dwc=4), "dwc must be odd"),
        (lambda: SimplifiedLinearAttention(8, num_heads=2, grid=(0, 3)), "at least 1, got"),
        (lambda: SimplifiedLinearAttention(8, num_heads=2)(torch.randn(1, 5, 8)), "must have 16 tokens"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        call()
