"""Feed-forward layers are found by what they compute, whatever their parts are called."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.engines.feedforward import ACTIVATIONS, feedforwards


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 6, bias=False), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c(F.silu(self.b(x)) * self.a(x))
        return out


class Plain(nn.Module):
    def __init__(self, act: str, *, mixes: bool = False) -> None:
        super().__init__()
        self.one, self.two, self.act, self.mixes = nn.Linear(4, 6), nn.Linear(6, 4), act, mixes

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.two(ACTIVATIONS[self.act](self.one(x)))
        return y.mean(1, keepdim=True).expand_as(y) if self.mixes else y


class Holder(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_every_activation_is_told_apart_and_formulas_hold() -> None:
    torch.manual_seed(0)
    model = Holder(*(Plain(name) for name in ACTIVATIONS), Gated()).double()
    found = feedforwards(model, torch.randn(2, 3, 4, dtype=torch.float64))
    assert [layer.activation for layer in found] == [*ACTIVATIONS, "silu"]
    last = found[-1]
    assert (last.up, last.gate, last.down, last.d_model, last.hidden) == ("a", "b", "c", 4, 6)
    x = torch.randn(5, 4, dtype=torch.float64)
    for layer in found:
        module = model.get_submodule(layer.name)
        up, down, gate = layer.linears(module)
        act = ACTIVATIONS[layer.activation]
        made = down(act(up(x)) if gate is None else act(gate(x)) * up(x))
        assert torch.allclose(made, module(x), atol=1e-12)


def test_what_mixes_tokens_or_holds_more_is_none() -> None:
    torch.manual_seed(0)
    extra = Plain("relu")
    extra.scale = nn.Parameter(torch.ones(1))
    model = Holder(Plain("relu", mixes=True), extra, nn.Linear(4, 4))
    assert feedforwards(model, torch.randn(2, 3, 4)) == []


def test_a_layer_that_is_called_twice_is_none() -> None:
    torch.manual_seed(0)
    layer = Plain("relu")
    assert feedforwards(Holder(layer, layer), torch.randn(2, 3, 4)) == []
