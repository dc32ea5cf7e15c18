"""Waists: where one tensor is all that is read on, found on a trace and tried; passes that pause and end there."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.meters import macs
from torchgraft.bench.models import ResidualNet
from torchgraft.engines.surgery.waists import narrows, pausing, waists
from torchgraft.errors import BadInput, Untraceable

Way = Callable[["_Net", Tensor], Tensor]


class _Net(nn.Module):
    """Three convolutions, joined in one of several ways."""

    def __init__(self, way: Way) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3)
        self.act, self.head = nn.ReLU(inplace=True), nn.Linear(4, 3)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.way(self, x).mean((2, 3)))
        return out


def _found(way: Way) -> list[str]:
    return [each.name for each in waists(_Net(way).eval(), images())]


def images(count: int = 5) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def test_costs_and_shapes_of_a_residual_network_are_counted_and_the_outermost_module_is_named() -> None:
    model, x = ResidualNet(widths=(4, 8), depth=2).eval(), images()
    found = waists(model, x)
    assert [each.name for each in found] == ["bn", "blocks.0", "blocks.1", "blocks.2", "blocks"]
    assert [(each.channels, each.size) for each in found[-3:]] == [(4, (8, 8)), (8, (4, 4)), (8, (4, 4))]
    whole = macs(model, x)
    first = 5 * 64 * 9 * 4
    assert found[0].cost == pytest.approx(first / whole)
    assert found[1].cost == pytest.approx((first + 2 * 5 * 64 * 9 * 16) / whole)
    assert all(narrows(model, each.name, x) for each in found)


def test_a_shortcut_past_a_module_is_no_waist() -> None:
    assert _found(lambda net, x: net.c(net.b(net.a(x)))) == ["a", "b", "c"]
    assert _found(lambda net, x: net.c((y := net.a(x)) + net.b(y))) == ["a", "c"]
    assert _found(lambda net, x: net.c(net.b(net.a(x))) + x.mean()) == []  # the input is read to the end
    assert _found(lambda net, x: net.c(net.b(y := net.a(x))) + y.amax()) == ["a"]
    assert _found(lambda net, x: net.c(net.b(net.a(x))) + net.a.weight.mean()) == ["a", "b", "c"]  # no input in it


def test_what_an_operation_in_place_has_changed_is_read_on() -> None:
    def way(net: _Net, x: Tensor) -> Tensor:
        y = net.a(x)
        F.relu_(y)
        return net.act(net.c(net.b(y)))  # type: ignore[no-any-return]

    assert _found(way) == ["a", "b", "act"]
    beside = _Net(lambda net, x: net.c(net.b(net.act(y := net.a(x)))) + y.mean((1, 2, 3), keepdim=True)).eval()
    assert [each.name for each in waists(beside, images())] == ["act"]  # y is what the operation has made
    assert not narrows(beside, "act", images())


def test_a_module_that_runs_twice_is_no_waist() -> None:
    assert _found(lambda net, x: net.c(net.b(net.b(net.a(x))))) == ["a", "c"]


def test_what_is_ignored_is_no_waist() -> None:
    model = ResidualNet(widths=(4, 8), depth=1).eval()
    assert "blocks.0" not in [each.name for each in waists(model, images(), ignore=["blocks.0"])]
    assert waists(model, images(), ignore=["*"]) == []


def test_a_number_of_samples_that_is_kept_from_before_shows_when_it_is_tried() -> None:
    def way(net: _Net, x: Tensor) -> Tensor:
        count = len(x)
        return net.c(net.b(net.a(x))).view(count, 4, 6, 6)  # type: ignore[no-any-return]

    model = _Net(way).eval()
    assert [each.name for each in waists(model, images())] == ["a", "b", "c"]
    assert not any(narrows(model, name, images()) for name in "abc")
    assert narrows(_Net(lambda net, x: net.c(net.b(net.a(x)))).eval(), "a", images())


def test_samples_that_look_at_each_other_show_when_they_are_tried() -> None:
    model = _Net(lambda net, x: (y := net.b(net.a(x))) - y.mean(0)).eval()
    assert not narrows(model, "a", images())


def test_a_branch_on_data_cannot_be_traced() -> None:
    model = _Net(lambda net, x: net.b(net.a(x)) if bool(x.sum() > 0) else net.a(x)).eval()
    with pytest.raises(Untraceable, match="branches on the values"):
        waists(model, images())


def test_a_pass_goes_on_with_what_it_is_given_or_ends() -> None:
    model, x = ResidualNet(widths=(4, 8), depth=2).eval(), images()
    whole = model(x)
    seen: list[tuple[int, int]] = []

    def halve(place: int, features: Tensor) -> Tensor:
        seen.append((place, len(features)))
        return features[: (len(features) + 1) // 2]

    torch.testing.assert_close(pausing(model, ["blocks.0", "blocks.2"], halve, x), whole[:2])
    assert seen == [(0, 5), (1, 3)]
    later: list[int] = []
    model.blocks[1].register_forward_hook(lambda *_: later.append(1))
    assert pausing(model, ["blocks.0"], lambda place, features: None, x) is None
    assert not later
    assert torch.equal(model(x), whole)
    assert not model.blocks[0]._forward_hooks


def test_a_pass_of_another_thread_is_not_looked_into() -> None:
    model, x = ResidualNet(widths=(4, 8), depth=2).eval(), images()
    whole = model(x)
    others: list[Tensor] = []

    def visit(place: int, features: Tensor) -> Tensor:
        if not others:
            other = threading.Thread(target=lambda: others.append(model(x)))
            other.start()
            other.join()
        return features[:1]

    torch.testing.assert_close(pausing(model, ["blocks.0", "blocks.1"], visit, x), whole[:1])
    assert torch.equal(others[0], whole)


def test_a_module_that_runs_again_or_returns_no_tensor_is_refused() -> None:
    twice = _Net(lambda net, x: net.b(net.b(net.a(x))))
    with pytest.raises(BadInput, match="'b' ran twice"):
        pausing(twice, ["b"], lambda place, features: features, images())
    pair = nn.Sequential(nn.LSTM(3, 3))
    with pytest.raises(BadInput, match="returned tuple"):
        pausing(pair, ["0"], lambda place, features: features, torch.zeros(2, 1, 3))
