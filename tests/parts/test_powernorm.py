"""PowerNorm: beside a loop written by hand, its backward pass and how it nears the exact one, and padding."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torchgraft.errors import BadInput
from torchgraft.parts.norms import powernorm
from torchgraft.parts.norms.powernorm import PowerNorm, convert_ln, padded

D = 6


def _started(**options: Any) -> Any:
    torch.manual_seed(0)
    norm: Any = PowerNorm(D, **options).double()
    with torch.no_grad():
        norm.weight.copy_(0.5 + torch.rand(D))
        norm.bias.copy_(torch.randn(D))
        norm.running_square.copy_(0.5 + torch.rand(D))
    return norm


def _by_hand(norm: Any, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Return output, gradients and running numbers after one step with running statistics; (N, D)."""
    g, b, square, nu = norm.weight.detach(), norm.bias.detach(), norm.running_square.clone(), norm.nu.clone()
    scaled, inputs = x, x
    if norm.group_scale:
        inputs = x.clone().requires_grad_()
        split = torch.unflatten(inputs, 1, (norm.group_scale, -1))
        scaled = (split / (split.square().mean(2, keepdim=True) + norm.eps).sqrt()).flatten(1)
    xs = scaled.detach()
    psi, batch = (square + norm.eps).sqrt(), xs.square().mean(0)
    xhat = xs / psi
    pushed = g * grad - (1 - norm.alpha_bwd) * nu * xhat
    dx = pushed / ((batch + norm.eps).sqrt() if norm.reference_backward else psi)
    if norm.group_scale:
        (dx,) = torch.autograd.grad(scaled, inputs, dx)
    return {
        "y": g * xhat + b,
        "x": dx,
        "weight": (grad * xhat).sum(0),
        "bias": grad.sum(0),
        "running_square": norm.alpha_fwd * square + (1 - norm.alpha_fwd) * batch,
        "nu": nu + (pushed * xhat).mean(0),
    }


def _stepped(norm: Any, x: Tensor, grad: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    y = norm(x, mask=mask)
    grads = torch.autograd.grad(y, [x, norm.weight, norm.bias], grad)
    found = dict(zip(("x", "weight", "bias"), grads, strict=True))
    return {"y": y.detach(), **found, "running_square": norm.running_square.clone(), "nu": norm.nu.clone()}


@settings(max_examples=25, deadline=None)
@given(
    groups=st.sampled_from([0, 1, 2, 6]),
    reference=st.booleans(),
    forward=st.floats(0.0, 0.99),
    backward=st.floats(0.0, 0.99),
    piece=st.sampled_from([7, 12, 1 << 16]),
)
def test_three_steps_equal_a_loop_by_hand(
    groups: int, reference: bool, forward: float, backward: float, piece: int
) -> None:
    norm = _started(group_scale=groups, reference_backward=reference, alpha_fwd=forward, alpha_bwd=backward)
    kept, powernorm._PIECE = powernorm._PIECE, piece
    try:
        for _ in range(3):
            x, grad = torch.randn(2, 5, D).double(), torch.randn(2, 5, D).double()
            expected = _by_hand(copy.deepcopy(norm), x.flatten(0, 1), grad.flatten(0, 1))
            found = _stepped(norm, x, grad)
            for name, value in expected.items():
                torch.testing.assert_close(found[name].reshape(value.shape), value, rtol=1e-10, atol=1e-10, msg=name)
    finally:
        powernorm._PIECE = kept
    assert int(norm.steps) == 3


@pytest.mark.parametrize("groups", [0, 1, 3])
def test_in_warm_up_the_gradient_is_the_derivative(groups: int) -> None:
    norm = _started(warmup=10, group_scale=groups)

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        twin = copy.deepcopy(norm)
        y: Tensor = torch.func.functional_call(twin, {"weight": weight, "bias": bias}, (x,))
        return y

    x = torch.randn(2, 4, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, norm.weight, norm.bias))


def test_in_warm_up_it_uses_and_averages_the_batchs_own_quadratic_mean() -> None:
    norm = _started(warmup=3, group_scale=0)
    batches = [torch.randn(2, 5, D).double() * scale for scale in (1.0, 2.0, 3.0)]
    g, b = norm.weight.detach(), norm.bias.detach()
    for x in batches:
        xhat = x / (x.square().mean((0, 1)) + norm.eps).sqrt()
        torch.testing.assert_close(norm(x).detach(), g * xhat + b)
    squares = torch.stack([x.square().mean((0, 1)) for x in batches])
    torch.testing.assert_close(norm.running_square, squares.mean(0))
    norm(batches[0])  # warm-up is over
    torch.testing.assert_close(norm.running_square, 0.9 * squares.mean(0) + 0.1 * squares[0])
    x = batches[1]
    expected = g * x / (norm.running_square + norm.eps).sqrt() + b
    torch.testing.assert_close(norm.eval()(x).detach(), expected)
    assert int(norm.steps) == 4


def test_the_gradient_nears_that_of_warm_up_geometrically() -> None:
    torch.manual_seed(1)
    x, grad = torch.randn(4, 50, D).double(), torch.randn(4, 50, D).double()
    norm = _started(group_scale=0, eps=1e-12)
    norm.running_square.copy_(x.square().mean((0, 1)))
    exact = _started(group_scale=0, eps=1e-12, warmup=5)
    expected = _stepped(exact, x, grad)["x"]
    gaps = [float((_stepped(norm, x, grad)["x"] - expected).norm()) for _ in range(40)]
    ratios = [after / before for before, after in itertools.pairwise(gaps)]
    assert all(abs(ratio - 0.9) < 0.005 for ratio in ratios), ratios[:5]
    assert gaps[0] > 1e-3


def test_nu_stays_bounded() -> None:
    torch.manual_seed(2)
    norm = _started(group_scale=0)
    most, least = 0.0, float("inf")
    for _ in range(300):
        x, grad = torch.randn(2, 8, D).double() * (0.5 + torch.rand(())), torch.randn(2, 8, D).double() + 1.0
        xhat = x / (norm.running_square + norm.eps).sqrt()
        most = max(most, float((norm.weight * grad * xhat).mean((0, 1)).abs().max().detach()))
        least = min(least, float(xhat.square().mean((0, 1)).min()))
        _stepped(norm, x, grad)
        assert float(norm.nu.abs().max()) <= most / (0.1 * least)
    assert float(norm.nu.abs().max()) > 0


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize("groups", [0, 2])
def test_padding_changes_nothing(warmup: int, groups: int) -> None:
    mask = torch.arange(5) < torch.tensor([5, 2, 0])[:, None]
    x, grad = torch.randn(3, 5, D).double(), torch.randn(3, 5, D).double()
    found = []
    for fill in (0.0, 50.0):
        norm = _started(warmup=warmup, group_scale=groups)
        for _ in range(2):
            given = torch.where(mask[..., None], x, fill)
            found.append(_stepped(norm, given, torch.where(mask[..., None], grad, fill), mask))
    for name in found[0]:
        torch.testing.assert_close(found[3][name], found[1][name], rtol=1e-12, atol=1e-12, msg=name)
    assert not found[0]["x"][~mask].any()
    assert not found[0]["y"][~mask].any()
    alone = _stepped(_started(warmup=warmup, group_scale=groups), x[mask][None], grad[mask][None])
    torch.testing.assert_close(found[0]["weight"], alone["weight"])
    torch.testing.assert_close(found[0]["x"][mask], alone["x"][0])
    torch.testing.assert_close(found[0]["running_square"], alone["running_square"])


def test_a_model_is_converted_with_its_weights_and_takes_a_mask() -> None:
    from transformers import BertConfig, BertModel

    sizes: Any = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    model: Any = BertModel(
        BertConfig(vocab_size=20, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes)
    )
    gain = model.encoder.layer[0].output.LayerNorm.weight.detach().clone()
    count = sum(isinstance(module, nn.LayerNorm) for module in model.modules())
    names = set(dict(model.named_parameters()))
    convert_ln(model, warmup=2)
    norms = [module for module in model.modules() if isinstance(module, PowerNorm)]
    assert len(norms) == count == 5
    assert set(dict(model.named_parameters())) == names
    assert torch.equal(model.encoder.layer[0].output.LayerNorm.weight, gain)
    tokens, mask = torch.randint(20, (2, 6)), torch.arange(6) < torch.tensor([[6], [3]])
    model.train()
    with padded(model, mask):
        model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state.square().mean().backward()
    assert all(norm.mask is None and int(norm.steps) == 1 for norm in norms)
    other = tokens.clone()
    other[~mask] = 7
    twin = copy.deepcopy(model)
    outs = []
    for each, ids in ((model, tokens), (twin, other)):
        with padded(each, mask):
            outs.append(each(input_ids=ids, attention_mask=mask.long()).last_hidden_state)
    torch.testing.assert_close(outs[0][mask], outs[1][mask], rtol=1e-4, atol=1e-5)


def test_torchs_fused_layer_is_left() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True).eval()
    convert_ln(layer)
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        fast = layer(x)
    torch.testing.assert_close(fast, layer(x).detach())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha_fwd": 1.0}, r"alpha_fwd must lie in \[0, 1\), got 1\.0"),
        ({"alpha_bwd": -0.1}, "alpha_bwd"),
        ({"warmup": -1}, "warmup must be at least 0"),
        ({"group_scale": 4}, "divide d_model = 6, got 4"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        PowerNorm(6, **options)


def test_bad_masks_and_models() -> None:
    with pytest.raises(BadInput, match=r"mask must be bool of shape \(1, 2\), got torch\.float32"):
        PowerNorm(6)(torch.randn(1, 2, 6), mask=torch.ones(1, 2))
    with pytest.raises(BadInput, match="no module of Linear matches"):
        convert_ln(nn.Linear(2, 2))
