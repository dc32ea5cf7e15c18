"""Layer norm: the formula and its invariances in float64, the recurrent cells written out, and insertion."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torchgraft.errors import BadInput
from torchgraft.parts.norms import layer_norm
from torchgraft.parts.norms.layer_norm import LayerNorm, LNGRUCell, LNLSTMCell, LNRNNCell, add_layernorm

DOUBLE = torch.float64


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def moved(module: nn.Module) -> nn.Module:
    module.to(DOUBLE)
    with torch.no_grad():
        for place, value in enumerate(module.parameters()):
            value.add_(0.1 * draw(*value.shape, seed=place + 5))
    return module


def plain(a: Tensor, norm: nn.Module | None = None, *, eps: float = 1e-5) -> Tensor:
    """The paper's formula, statistics over the last axis."""
    mean = a.sum(-1, keepdim=True) / a.shape[-1]
    sigma = (((a - mean) ** 2).sum(-1, keepdim=True) / a.shape[-1] + eps).sqrt()
    y = (a - mean) / sigma
    if isinstance(norm, LayerNorm):
        y = y * norm.weight if norm.bias is None else y * norm.weight + norm.bias
    return y


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=0, max_size=3), st.integers(2, 9), st.integers(0, 99))
def test_it_is_the_formula(leading: list[int], width: int, seed: int) -> None:
    norm, x = moved(LayerNorm(width)), draw(*leading, width, seed=seed).requires_grad_()
    leaves = (x, *norm.parameters())
    outs = norm(x), plain(x, norm)
    torch.testing.assert_close(*outs, rtol=1e-10, atol=1e-10)
    weight = draw(*x.shape, seed=3)
    for found, expected in zip(
        *(torch.autograd.grad((out * weight).sum(), leaves, retain_graph=True) for out in outs), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_several_axes_are_one() -> None:
    x = draw(3, 4, 5)
    norm = moved(LayerNorm((4, 5)))
    torch.testing.assert_close(norm(x), nn.functional.layer_norm(x, (4, 5), norm.weight, norm.bias), rtol=0, atol=1e-12)
    assert norm.weight.shape == (4, 5)
    assert LayerNorm((4, 5), bias=False).bias is None
    assert LayerNorm(4, elementwise_affine=False).weight is None


def test_invariances_of_the_weights() -> None:
    W, x, shift = draw(6, 4), draw(5, 4, seed=1), draw(4, seed=2)
    norm = moved(LayerNorm(6, eps=1e-12))
    expected = norm(x @ W.T)
    torch.testing.assert_close(norm(x @ (3.0 * W + shift).T), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        norm((x * torch.tensor([[0.01], [1], [2], [30], [500]])) @ W.T), expected, atol=1e-7, rtol=0
    )
    one_row = W.clone()
    one_row[2] *= 3
    assert (norm(x @ one_row.T) - expected).abs().max() > 0.1
    assert (norm(x @ (-W).T) - expected).abs().max() > 0.1


def test_gradient_is_orthogonal_to_ones_and_to_the_deviations() -> None:
    a = draw(5, 7).requires_grad_()
    (grad,) = torch.autograd.grad((LayerNorm(7, eps=1e-14).to(DOUBLE)(a) * draw(5, 7, seed=1)).sum(), a)
    deviations = (a - a.mean(-1, keepdim=True)).detach()
    assert grad.abs().max() > 0.1
    assert grad.sum(-1).abs().max() < 1e-12
    assert (grad * deviations).sum(-1).abs().max() < 1e-12


def test_rnn_cell_is_the_equation() -> None:
    cell, x, h = moved(LNRNNCell(3, 4)), draw(2, 3), draw(2, 4, seed=1)
    expected = torch.tanh(plain(h @ cell.weight_hh.T + x @ cell.weight_ih.T, cell.norm))
    torch.testing.assert_close(cell(x, (h,))[0], expected, rtol=0, atol=1e-12)


def test_lstm_cell_is_the_equation() -> None:
    cell, x, h, c = moved(LNLSTMCell(3, 4)), draw(2, 3), draw(2, 4, seed=1), draw(2, 4, seed=2)
    gates = plain(h @ cell.weight_hh.T, cell.norm_hh) + plain(x @ cell.weight_ih.T, cell.norm_ih)
    f, i, o, u = (gates[:, 4 * k : 4 * k + 4] for k in range(4))
    memory = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(u)
    output = torch.sigmoid(o) * torch.tanh(plain(memory, cell.norm_c))
    for found, expected in zip(cell(x, (h, c)), (output, memory), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_gru_cell_is_the_equation() -> None:
    cell, x, h = moved(LNGRUCell(3, 4)), draw(2, 3), draw(2, 4, seed=1)
    from_h, from_x = h @ cell.weight_hh.T, x @ cell.weight_ih.T
    z, r = torch.sigmoid(plain(from_h[:, :8], cell.norm_hh) + plain(from_x[:, :8], cell.norm_ih)).chunk(2, -1)
    u = torch.tanh(plain(from_x[:, 8:], cell.norm_iu) + r * plain(from_h[:, 8:], cell.norm_hu))
    torch.testing.assert_close(cell(x, (h,))[0], (1 - z) * h + z * u, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [LNRNNCell, LNLSTMCell, LNGRUCell])
def test_a_sequence_is_its_steps_and_samples_are_apart(kind: type[nn.Module]) -> None:
    cell, x = moved(kind(3, 4)), draw(2, 5, 3)
    outputs, last = cell.sequence(x)
    state = None
    for token in range(5):
        state = cell(x[:, token], state)
        torch.testing.assert_close(state[0], outputs[:, token], rtol=0, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=0, atol=1e-12)
    torch.testing.assert_close(cell.sequence(x[1:])[0], outputs[1:], rtol=0, atol=1e-12)
    grads = torch.autograd.grad(outputs.square().sum(), list(cell.parameters()))
    assert all(bool(grad.any()) for grad in grads)
    with pytest.raises(BadInput, match=r"takes \(B, 3\), got \(2, 4\)"):
        cell(draw(2, 4))
    with pytest.raises(BadInput, match="sizes of at least 1"):
        kind(0, 4)
    gains = [norm.weight for norm in kind(3, 4, gain=0.1).modules() if isinstance(norm, LayerNorm)]
    assert all(bool((gain == 0.1).all()) for gain in gains)


@pytest.mark.parametrize("kind", [LNRNNCell, LNLSTMCell, LNGRUCell])
def test_cells_do_not_see_the_scale_of_what_they_project(kind: type[nn.Module]) -> None:
    cell, x = moved(kind(3, 4)), draw(2, 5, 3)
    for norm in cell.modules():
        if isinstance(norm, LayerNorm):
            norm.eps = 1e-14
    before = cell.sequence(x)[0]
    with torch.no_grad():
        cell.weight_hh.mul_(7.0)
        cell.weight_ih.mul_(7.0)
    torch.testing.assert_close(cell.sequence(x)[0], before, rtol=0, atol=1e-9)


def test_norms_go_before_activations_of_sequences() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 2))
    before, x = list(model.state_dict()), torch.randn(3, 1, 4, 4)
    conv, act, flat, linear, tanh, head = model
    assert add_layernorm(model) == ("1.0", "4.0")
    a = conv(x)
    a = (a - a.mean((1, 2, 3), keepdim=True)) / (a.var((1, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    expected = head(tanh(plain(linear(flat(act(a))))))
    torch.testing.assert_close(model(x), expected)
    assert [name for name in model.state_dict() if name in before] == before
    assert model[1][0].weight.shape == (4,)


def test_norms_go_after_activations_or_after_named_layers() -> None:
    x = torch.randn(3, 4)
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 2)).double()
    first, act, head = model
    x = x.double()
    assert add_layernorm(model, before_activation=False) == ("1.1",)
    torch.testing.assert_close(model(x), head(plain(act(first(x)))))
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 2)).double().eval()
    assert add_layernorm(model, where="0") == ("0.1",)
    assert not model[0][1].training
    torch.testing.assert_close(model(x), model[2](model[1](plain(model[0][0](x)))))


def test_bad_input_is_refused() -> None:
    with pytest.raises(BadInput, match="no layer followed by an activation"):
        add_layernorm(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    with pytest.raises(BadInput, match="leave out where"):
        add_layernorm(nn.Sequential(nn.Linear(2, 2)), where="0", before_activation=False)
    with pytest.raises(BadInput, match="'0' is a ReLU"):
        add_layernorm(nn.Sequential(nn.ReLU()), where="0")
    for shape in (0, (), (3, -1)):
        with pytest.raises(BadInput, match="at least 1"):
            LayerNorm(shape)
    for wrong in (draw(3, 4), draw(5, 2), torch.zeros(2, 5, dtype=torch.long)):
        with pytest.raises(BadInput, match="last sizes are"):
            LayerNorm(5)(wrong)


def test_a_wrong_norm_is_noticed() -> None:
    """The oracle fails for an unbiased variance and for detached statistics."""
    x = draw(4, 5).requires_grad_()
    unbiased = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-5).sqrt()
    assert (unbiased - plain(x)).abs().max() > 1e-3
    detached = (x - x.mean(-1, keepdim=True).detach()) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt().detach()
    grads = [torch.autograd.grad((y * draw(4, 5, seed=2)).sum(), x)[0] for y in (detached, plain(x))]
    assert all((one - other).abs().max() > 1e-2 for one, other in itertools.combinations(grads, 2))
    assert layer_norm.CARD.seed_id == 167
