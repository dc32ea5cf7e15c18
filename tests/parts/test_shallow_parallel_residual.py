"""The shallow parallel layer: its expansion, how its error falls, and its fusion into one product."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torchgraft.bench.models import ResidualNet
from torchgraft.engines.residual import unflatten
from torchgraft.errors import BadInput
from torchgraft.parts.blocks.shallow_parallel_residual import (
    ParallelResidual,
    WideBranches,
    flatten_residual_stack,
    residual_expansion,
)


class Block(nn.Module):
    """x + eps act(W x)."""

    def __init__(self, weight: Tensor, eps: float = 1.0, act: nn.Module | None = None) -> None:
        super().__init__()
        self.weight, self.eps, self.act = nn.Parameter(weight), eps, act or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.eps * self.act(x @ self.weight.T)
        return out


def weights(count: int, size: int = 5, seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(size, size, generator=draw, dtype=torch.float64) / size for _ in range(count)]


@given(st.integers(1, 6), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_linear_branches_at_full_order_are_the_sequential_stack(h: int, seed: int) -> None:
    stack = [Block(weight) for weight in weights(h, seed=seed)]
    x = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        expected = nn.Sequential(*stack)(x)
        assert torch.allclose(residual_expansion(stack, x, h), expected, atol=1e-12, rtol=1e-12)
        first = x + sum(x @ block.weight.T for block in stack)
        assert torch.allclose(residual_expansion(stack, x, 1), first, atol=1e-12)


def test_first_order_is_exact_where_branches_annihilate_each_other() -> None:
    # F_1 writes what F_2 does not read and the other way round: F_i F_j = 0 for i != j, and no F_i is zero.
    one, two = torch.zeros(4, 4).double(), torch.zeros(4, 4).double()
    one[0, 0], one[0, 1], two[2, 2], two[3, 2] = 2.0, -1.0, 0.5, 3.0
    assert not (one @ two).any()
    assert not (two @ one).any()
    stack = [Block(one), Block(two)]
    x = torch.randn(3, 4).double()
    with torch.no_grad():
        assert torch.allclose(residual_expansion(stack, x, 1), nn.Sequential(*stack)(x), atol=1e-12)
        stack[1].weight[0, 0] = 1.0
        assert not torch.allclose(residual_expansion(stack, x, 1), nn.Sequential(*stack)(x), atol=1e-3)


def test_the_error_of_order_m_falls_with_the_power_m_plus_1() -> None:
    x = torch.randn(16, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    sizes = np.array([0.02, 0.01, 0.005, 0.0025])
    for order in (1, 2):
        errors = []
        for eps in sizes:
            stack = [Block(4 * weight, float(eps), nn.Tanh()) for weight in weights(4)]
            with torch.no_grad():
                gap = residual_expansion(stack, x, order) - nn.Sequential(*stack)(x)
            errors.append(float(gap.norm()))
        slope = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
        assert abs(slope - (order + 1)) <= 0.05


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Linear(6, 6) for _ in range(3)],
        [nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)],
        [nn.Conv2d(4, 4, 5, padding=2, padding_mode="reflect", bias=False) for _ in range(2)],
        [nn.Conv1d(4, 4, 3, padding=2, dilation=2) for _ in range(2)],
    ],
)
@pytest.mark.parametrize("activation", ["relu", "tanh", "none"])
def test_one_wide_product_gives_what_the_branches_give(layers: list[nn.Module], activation: str) -> None:
    layers = [layer.double() for layer in layers]
    act = {"relu": torch.relu, "tanh": torch.tanh, "none": lambda x: x}[activation]
    shape = (2, 6) if isinstance(layers[0], nn.Linear) else (2, 4, *(8,) * (layers[0].weight.ndim - 2))  # type: ignore[operator]
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    wide = WideBranches.of(layers, activation=activation)
    expected = sum(act(layer(x)) for layer in layers)
    assert torch.allclose(wide(x), expected, atol=1e-12)  # type: ignore[arg-type]
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (wide(x), expected)]  # type: ignore[union-attr]
    assert torch.allclose(*grads, atol=1e-11)
    assert sum(p.numel() for p in wide.parameters()) == sum(p.numel() for layer in layers for p in layer.parameters())


def test_the_layer_that_is_made_equals_its_branches() -> None:
    layer = ParallelResidual(3, d_model=4, scale=0.5).double()
    assert layer.wide is not None
    weight, bias = (layer.wide.wide.get_parameter(name) for name in ("weight", "bias"))
    x = torch.randn(2, 3, 4).double()
    parts = [torch.relu(x @ weight[i : i + 4].T + bias[i : i + 4]) for i in (0, 4, 8)]
    assert torch.allclose(layer(x), x + 0.5 * sum(parts), atol=1e-12)
    given = ParallelResidual([nn.Tanh(), nn.ReLU()])
    x = torch.tensor([[-1.0, 2.0]])
    assert torch.allclose(given(x), x + x.tanh() + x.relu())


def test_flatten_then_unflatten_keeps_every_tensor() -> None:
    model = ResidualNet(widths=(4,), depth=4).eval()
    x = torch.randn(2, 1, 8, 8)
    before = copy.deepcopy(model.state_dict())
    for order in (1, 2):
        flat = flatten_residual_stack(model, example=x, order=order)
        assert sum(p.numel() for p in flat.parameters()) == sum(p.numel() for p in model.parameters())
        after = unflatten(flat).state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], value) for name, value in before.items())
    with torch.no_grad():
        assert torch.allclose(flatten_residual_stack(model, example=x, order=4)(x), model(x), atol=1e-5)
        assert not torch.allclose(flatten_residual_stack(model, example=x, order=1)(x), model(x), atol=1e-3)


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(BadInput, match="branches"):
        ParallelResidual([])
    with pytest.raises(BadInput, match="branches must be at least 1, got 0"):
        ParallelResidual(0)
    with pytest.raises(BadInput, match="'rely'"):
        ParallelResidual(2, d_model=4, activation="rely")
    with pytest.raises(BadInput, match="keep the shape"):
        ParallelResidual([nn.Linear(4, 3)])(torch.zeros(1, 4))
    with pytest.raises(BadInput, match="divide the 6 outputs"):
        WideBranches(nn.Linear(4, 6), branches=4)
    with pytest.raises(BadInput, match="at least one"):
        WideBranches.of([])
    for layers in ([nn.Linear(4, 4), nn.Linear(4, 3)], [nn.ReLU()], [nn.Conv2d(4, 4, 1, groups=2)] * 2):
        with pytest.raises(BadInput, match="equal linear layers"):
            WideBranches.of(layers)
    model = ResidualNet(widths=(4,), depth=3)
    with pytest.raises(BadInput, match="order"):
        flatten_residual_stack(model, example=torch.zeros(1, 1, 8, 8), order=0)
    with pytest.raises(BadInput, match="spans"):
        flatten_residual_stack(model, (2, 2), example=torch.zeros(1, 1, 8, 8))
