"""Standardised weights and batch-channel norm: their laws in float64, and batch norm then group norm written out."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import torchgraft
from torchgraft.bench.models import ResidualNet
from torchgraft.engines.parametrize import parametrize, spec_of
from torchgraft.errors import BadInput
from torchgraft.parts.norms.weight_standardization_bcn import (
    BatchChannelNorm,
    Standardized,
    micro_batch_ready,
    weight_standardize,
)

DOUBLE = torch.float64


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE) * 2 + 1


def moved(norm: BatchChannelNorm) -> BatchChannelNorm:
    norm.to(DOUBLE)
    with torch.no_grad():
        for place, value in enumerate(norm.parameters()):
            value.add_(0.1 * draw(*value.shape, seed=place + 5))
    return norm


def conv() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return parametrize(nn.Conv2d(3, 4, 3).double(), Standardized())


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 5), st.integers(2, 30), st.floats(0.01, 100.0), st.integers(0, 99))
def test_weights_have_zero_mean_and_unit_deviation(outputs: int, inputs: int, size: float, seed: int) -> None:
    W = (size * draw(outputs, inputs, seed=seed)).requires_grad_()
    made = Standardized(eps=1e-12).weight((W,), {}, W.shape)
    torch.testing.assert_close(made.mean(1), torch.zeros(outputs, dtype=DOUBLE), rtol=0, atol=1e-9)
    torch.testing.assert_close(made.std(1, correction=0), torch.ones(outputs, dtype=DOUBLE), rtol=0, atol=1e-8)
    upstream = draw(outputs, inputs, seed=7)
    (grad,) = torch.autograd.grad((made * upstream).sum(), W)
    centred = (W - W.mean(1, keepdim=True)).detach()
    scale = upstream.norm(dim=1) / W.std(1, correction=0)
    assert bool((grad.sum(1).abs() <= 1e-9 * scale).all())
    assert bool(((grad * centred).sum(1).abs() <= 1e-8 * scale * centred.norm(dim=1)).all())
    assert bool((grad.norm(dim=1) <= (1 + 1e-9) * scale).all())


def test_eps_is_added_to_the_deviation() -> None:
    made = Standardized(eps=0.5).weight((torch.tensor([[1.0, 3.0]], dtype=DOUBLE),), {}, torch.Size([1, 2]))
    assert made.tolist() == [pytest.approx([-1 / 1.5, 1 / 1.5])]


def test_the_layer_does_not_see_scale_and_shift_of_an_output() -> None:
    layer, x = conv(), draw(2, 3, 5, 5)
    before = layer(x)
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(torch.tensor([2.0, 0.5, 7.0, 1.0])[:, None, None, None]).add_(3.0)
    torch.testing.assert_close(layer(x), before, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        layer.parametrizations.weight.original[0].neg_()
    assert (layer(x)[:, 0] - before[:, 0]).abs().max() > 0.5


def test_folding_makes_the_weight_plain() -> None:
    layer, x = conv(), draw(2, 3, 5, 5)
    before = layer(x)
    folded = torchgraft.fold(layer)
    assert spec_of(folded) == ()
    assert type(folded.weight) is nn.Parameter
    torch.testing.assert_close(folded(x), before, rtol=0, atol=1e-12)


def test_exact_statistics_are_batch_norm_then_group_norm() -> None:
    norm = moved(BatchChannelNorm(6, groups=2, estimate=False))
    batch = nn.BatchNorm2d(6).double()
    batch.load_state_dict({"weight": norm.weight, "bias": norm.bias}, strict=False)
    for training in (True, True, False):
        norm.train(training)
        batch.train(training)
        x = draw(3, 6, 4, 5, seed=int(training)).requires_grad_()
        grouped = F.group_norm(batch(x), 2)
        gain, offset = (value.repeat_interleave(3)[:, None, None] for value in (norm.group_weight, norm.group_bias))
        outs, leaves = (norm(x), grouped * gain + offset), (x, norm.group_weight, norm.group_bias)
        torch.testing.assert_close(*outs, rtol=1e-9, atol=1e-9)
        grads = [torch.autograd.grad((out * draw(*x.shape, seed=3)).sum(), leaves) for out in outs]
        torch.testing.assert_close(*grads, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(norm.running_var, batch.running_var, rtol=0, atol=1e-12)
    torch.testing.assert_close(norm.running_mean, batch.running_mean, rtol=0, atol=1e-12)


def test_estimates_move_by_the_papers_rule_and_get_no_gradient() -> None:
    norm = moved(BatchChannelNorm(4, groups=2, momentum=0.25))
    mu, v = torch.zeros(4, dtype=DOUBLE), torch.ones(4, dtype=DOUBLE)
    for seed in range(3):
        x = draw(2, 4, 3, 3, seed=seed).requires_grad_()
        rows = x.detach().transpose(0, 1).flatten(1)
        v = 0.75 * v + 0.25 * (rows - mu[:, None]).square().mean(1)
        mu = 0.75 * mu + 0.25 * rows.mean(1)
        y = (x - mu[:, None, None]) / (v + 1e-5).sqrt()[:, None, None]
        y = F.group_norm(y * norm.weight[:, None, None] + norm.bias[:, None, None], 2)
        y = y * norm.group_weight.repeat_interleave(2)[:, None, None]
        y = y + norm.group_bias.repeat_interleave(2)[:, None, None]
        outs, leaves = (norm(x), y), (x, *norm.parameters())
        torch.testing.assert_close(*outs, rtol=1e-9, atol=1e-9)
        grads = [torch.autograd.grad((out * draw(*x.shape, seed=9)).sum(), leaves) for out in outs]
        torch.testing.assert_close(*grads, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(norm.running_mean, mu, rtol=0, atol=1e-12)
    torch.testing.assert_close(norm.running_var, v, rtol=0, atol=1e-12)
    assert int(norm.num_batches_tracked) == 3


def test_at_full_speed_two_updates_give_batch_norm() -> None:
    estimated = moved(BatchChannelNorm(4, groups=2, momentum=1.0))
    exact = copy.deepcopy(estimated)
    exact.estimate = False
    x = draw(3, 4, 3, 3)
    first, second = estimated(x), estimated(x)
    torch.testing.assert_close(second, exact(x), rtol=0, atol=1e-9)
    assert (first - second).abs().max() > 1e-2
    torch.testing.assert_close(estimated.eval()(x)[1:2], estimated(x[1:2]), rtol=0, atol=1e-12)


def test_gradients_of_gradients() -> None:
    norm, x = moved(BatchChannelNorm(4, groups=2, estimate=False)), draw(2, 4, 2, 2).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda value: copy.deepcopy(norm)(value).square().sum(), (x,))


def test_default_groups_leave_four_channels() -> None:
    assert [BatchChannelNorm(channels).groups for channels in (1, 4, 6, 8, 20, 64, 256)] == [1, 1, 1, 2, 5, 16, 32]


def test_micro_batch_ready_takes_over_what_was_learnt() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ResidualNet(widths=(8, 16), depth=1)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.data.uniform_(0.5, 1.5)
                module.running_var.uniform_(0.5, 2.0)
    before = copy.deepcopy(model)
    report = micro_batch_ready(model)
    assert report.modules == sum(isinstance(module, nn.BatchNorm2d) for module in before.modules()) == 6
    for name in report.names:
        old, new = before.get_submodule(name), model.get_submodule(name)
        assert isinstance(new, BatchChannelNorm)
        assert torch.equal(old.weight, new.weight)
        assert torch.equal(old.running_var, new.running_var)
    standardized = [name for name, module in model.named_modules() if spec_of(module)]
    assert standardized == [name for name, module in before.named_modules() if isinstance(module, nn.Conv2d)]
    out = model(torch.randn(1, 1, 8, 8))
    out.sum().backward()
    assert all(value.grad is not None for value in model.parameters())


def test_which_layers_are_standardised() -> None:
    def made(where: object = None) -> list[str]:
        model = nn.Sequential(
            nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 8, 1), nn.Flatten(), nn.Linear(8, 6), nn.Linear(6, 2)
        )
        weight_standardize(weight_standardize(model, where=where), where=where)  # type: ignore[arg-type]
        assert all(len(spec_of(module)) <= 1 for module in model)
        return [name for name, module in model.named_modules() if spec_of(module)]

    assert made() == ["1", "3"]
    assert made("[04]") == ["0", "4"]


def test_bad_input_is_refused() -> None:
    with pytest.raises(BadInput, match="groups must divide the 6 channels, got 4"):
        BatchChannelNorm(6, groups=4)
    with pytest.raises(BadInput, match="more than one value a channel"):
        BatchChannelNorm(4, estimate=False)(torch.zeros(1, 4, 1, 1))
    with pytest.raises(BadInput, match="at least two inputs"):
        weight_standardize(nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 2)))
    with pytest.raises(BadInput, match="no layer whose weights"):
        weight_standardize(nn.Sequential(nn.ReLU()))
    with pytest.raises(BadInput, match="cannot be taken over"):
        micro_batch_ready(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, affine=False)))
