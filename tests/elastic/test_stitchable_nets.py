"""Stitched networks: least squares by its normal equations, equal anchors, and costs that are sums of parts."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.meters import macs
from torchgraft.bench.task import Task
from torchgraft.contracts.subjects import case
from torchgraft.elastic.stitchable_nets import SNNet, StitchableNets
from torchgraft.engines.nesting import ElasticModule
from torchgraft.engines.nesting.stitch import Stitched, layer_outputs, least_squares, windows
from torchgraft.errors import BadInput


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + torch.tanh(self.fc(x))
        return out


def _net(width: int, depth: int = 4, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return (
        nn.Sequential(nn.Linear(3, width), *(_Block(width) for _ in range(depth)), nn.Linear(width, 2)).double().eval()
    )


X = torch.randn(200, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_anchors_are_reproduced_bit_for_bit() -> None:
    anchors = [_net(4), _net(6), _net(8)]
    expected = [anchor(X) for anchor in anchors]
    family = SNNet(anchors, X[:2])
    family.double().init_stitches(X)
    for config, value in enumerate(expected):
        assert torch.equal(family.use(config)(X), value)
        family.use(5)(X)  # a stitched pass leaves the anchors as they were
        assert torch.equal(family.use(config)(X), value)
    assert {(route.front, route.end) for route in family.routes} == {(0, 1), (1, 2)}
    assert (0, 2) in {(route.front, route.end) for route in SNNet(anchors, X[:2], nearest=False).routes}


def test_stitches_between_equal_anchors_are_the_identity() -> None:
    net = _net(5)
    family = SNNet([net, copy.deepcopy(net)], X[:2], kernel=1).double()
    random = family.use(2)(X)
    assert (random - net(X)).abs().max() > 1e-2
    family.init_stitches(X)
    # Features after a tanh span all five dimensions, so the map is the identity itself, not only on a subspace.
    for stitch in family.stitches.values():
        assert torch.allclose(stitch.weight, torch.eye(5, dtype=torch.float64), atol=1e-6)
        assert torch.allclose(stitch.bias, torch.zeros(5, dtype=torch.float64), atol=1e-6)
    for config in range(len(family)):
        assert torch.allclose(family.use(config)(X), net(X), rtol=1e-6)


def test_a_route_is_its_parts_one_after_another() -> None:
    small, large = _net(4), _net(6, seed=1)
    family = SNNet([small, large], X[:2]).double()
    for config, route in enumerate(family.routes, 2):
        hidden = small[: 1 + route.left](X)
        mapped = family.stitches[route.stitch](hidden)
        expected = large[1 + route.entered :](mapped)
        assert torch.allclose(family.use(config)(X), expected, atol=1e-12)
        parts = 3 * 4 + 16 * route.left + 4 * 6 + 3 * 6 + 36 * (4 - route.entered) + 6 * 2  # the stem of both runs
        assert macs(family, X[:1]) == parts
        low, high = macs(small, X[:1]), macs(large, X[:1])
        if route.left == route.entered:
            assert low <= parts <= high + 4 * 6 + 3 * 4


@given(n=st.integers(5, 40), d=st.integers(1, 6), e=st.integers(1, 5), rank=st.integers(1, 6), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_the_normal_equations(n: int, d: int, e: int, rank: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, min(rank, d), generator=draw) @ torch.randn(min(rank, d), d, generator=draw)
    y = torch.randn(n, e, generator=draw)
    weight, bias = least_squares(x.double(), y.double())
    residual = x.double() @ weight.T + bias - y.double()
    wide = torch.cat([x, torch.ones(n, 1)], 1).double()
    assert float((wide.T @ residual).abs().max()) < 1e-4


def test_shared_stitches_are_the_mean_of_their_maps() -> None:
    small, large = _net(4), _net(6, seed=1)
    family = SNNet([small, large], X[:2]).double()
    family.init_stitches(X)
    before = [layer_outputs(net, stack, X) for net, stack in zip((small, large), family.stacks, strict=True)]
    pairs = [(route.left, route.entered) for route in family.routes if route.stitch == "0-1-0"]
    assert pairs == [(1, 1), (1, 2), (2, 1), (2, 2)]
    maps = [least_squares(before[0][left - 1], before[1][entered - 1])[0] for left, entered in pairs]
    assert torch.allclose(family.stitches["0-1-0"].weight, torch.stack(maps).mean(0))


def test_windows() -> None:
    assert windows(4, 4, kernel=1) == [[(1, 1)], [(2, 2)], [(3, 3)]]
    pairs = [pair for window in windows(3, 6) for pair in window]
    assert len(set(pairs)) == len(pairs)
    assert all(1 <= left <= 3 and 1 <= entered <= 5 for left, entered in pairs)
    with pytest.raises(BadInput, match="at least 1"):
        windows(0, 3)


def test_training_moves_stitches_and_switching_is_an_index() -> None:
    anchors = [_net(4).float(), _net(6).float()]
    family = SNNet(anchors, X[:2].float())
    before = copy.deepcopy(family.state_dict())
    x, y = X.float(), torch.randint(2, (200,))
    task = Task(anchors[-1], (x, y), (x, y), (x, y), F.cross_entropy, lambda out, t: (out.argmax(1) == t).float())
    assert family.fit(task, steps=0) == 0
    assert all(torch.equal(value, before[name]) for name, value in family.state_dict().items())
    assert family.fit(task, steps=3, teacher=copy.deepcopy(anchors[-1])) == 3
    assert any(not torch.equal(value, before[name]) for name, value in family.state_dict().items())
    points = family.pareto(task)
    assert len(points) == len(family)
    assert points[0][0] < points[1][0]
    assert family.config == 1
    with pytest.raises(BadInput, match="steps"):
        family.fit(task, steps=-1)


def test_every_config_is_trained_as_often_as_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    family = SNNet([_net(4).float(), _net(6).float()], X[:2].float())
    x, y = X.float(), torch.randint(2, (200,))
    task = Task(family, (x, y), (x, y), (x, y), F.cross_entropy, lambda out, t: (out.argmax(1) == t).float())
    drawn: list[int] = []
    plain = Stitched.use

    def watched(self: Stitched, config: int) -> Stitched:
        drawn.append(config)
        return plain(self, config)

    monkeypatch.setattr(Stitched, "use", watched)
    steps = 30 * len(family)
    family.fit(task, steps=steps)
    counts = torch.bincount(torch.tensor(drawn[:steps]), minlength=len(family))  # the anchors are configs too
    assert len(counts) == len(family)
    assert chisquare(counts.numpy()).pvalue > 0.001


def test_images_are_stitched_along_their_channels() -> None:
    tiny = case("cnn")
    family = SNNet([tiny.build(0), tiny.build(0)], tiny.inputs, kernel=1)
    assert family.channels == 1
    family.init_stitches(tiny.inputs)
    with torch.no_grad():
        for config in range(len(family)):
            assert torch.allclose(family.use(config)(tiny.inputs), family.use(0)(tiny.inputs), atol=1e-3)


def test_batch_norms_of_the_frozen_original_do_not_move_in_training() -> None:
    tiny = case("cnn")
    procedure = StitchableNets()
    elastic = procedure.build(tiny.model, tiny.task)
    before = copy.deepcopy(elastic.full.state_dict())
    procedure.train(elastic, tiny.task, steps=2)
    assert all(torch.equal(value, before[name]) for name, value in elastic.full.state_dict().items())


def test_what_cannot_be_stitched_is_refused() -> None:
    with pytest.raises(BadInput, match="two anchors"):
        SNNet([_net(4)], X)
    with pytest.raises(BadInput, match="no stack"):
        SNNet([nn.Linear(3, 2).double()] * 2, X)
    family = SNNet([_net(4), _net(6)], X[:2])
    with pytest.raises(BadInput, match="config"):
        family.use(99)
    assert isinstance(family, Stitched)
    with pytest.raises(BadInput, match="width"):
        StitchableNets(width=1.0)
    plain = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    y = torch.zeros(4, dtype=torch.long)
    task = Task(
        plain, (X[:4].float(), y), (X[:4].float(), y), (X[:4].float(), y), F.cross_entropy, lambda o, t: o[:, 0]
    )
    assert StitchableNets().applies_to(plain, task) == []
    assert "stack" in StitchableNets().refusals(plain, task)[0].reason

    class Other(ElasticModule):
        def select(self, level: int) -> None:
            del level

    with pytest.raises(BadInput, match="Other"):
        StitchableNets().train(Other((1.0,)), task, steps=1)
