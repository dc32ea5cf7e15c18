"""Generated networks: ordinary modules, the same twice, with exact gradients to the functions that make them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from torchgraft.bench.task import Task
from torchgraft.bench.training import train
from torchgraft.elastic.neural_metamorphosis import Field, NeuMeta, coordinates
from torchgraft.errors import BadInput


def _family(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3), nn.ReLU(), nn.Conv2d(width, 3, 1), nn.Flatten(), nn.Linear(3 * 4, 2, bias=False)
    )


def _meta(**settings: float) -> NeuMeta:
    torch.manual_seed(0)
    return NeuMeta(_family, (4, 8), _family(8), 8, hidden=12, depth=2, frequencies=3, **settings)  # type: ignore[arg-type]


X = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(2))


def test_coordinates_by_hand() -> None:
    v = coordinates(1, 3, (2, 3, 5, 5), 4.0)
    assert v.shape == (6, 6)
    assert (4 * v).tolist()[4] == [1, 1, 1, 3, 3, 2]  # layer, in 1, out 1, of 3 layers, 3 ins, 2 outs
    assert (4 * coordinates(0, 3, (2,), 4.0)).tolist() == [[0, 0, 0, 3, 1, 2], [0, 0, 1, 3, 1, 2]]
    assert torch.equal(
        coordinates(1, 3, (2, 3), 4.0, torch.ones(6, 6)) - coordinates(1, 3, (2, 3), 4.0), torch.ones(6, 6) / 4
    )


def test_features_and_residual_layers_by_hand() -> None:
    torch.manual_seed(0)
    field = Field(2, hidden=4, depth=1, frequencies=2)
    v = torch.rand(3, 6)
    turns = torch.stack([math.pi * v, 2 * math.pi * v], 2).flatten(1)
    features = [v, turns.sin(), turns.cos()]
    x = field.first(torch.cat(features, 1))
    x = 0.1 * torch.relu(field.layers[0](x)) + x
    assert torch.allclose(field(v), field.last(x), atol=1e-6)


def test_only_what_depends_on_the_width_is_generated() -> None:
    meta = _meta()
    assert meta.names == ("0.weight", "0.bias", "2.weight")
    made, teacher = meta.tensors(8), dict(_family(8).named_parameters())
    assert {name: value.shape for name, value in made.items()} == {n: v.shape for n, v in teacher.items()}
    assert torch.equal(made["2.bias"], meta.rest["2/bias"])
    assert meta.tensors(5)["2.weight"].shape == (3, 5, 1, 1)


@pytest.mark.parametrize("width", [3, 4, 6, 8, 11])
def test_a_sample_is_an_ordinary_module_and_the_same_twice(width: int) -> None:
    meta = _meta()
    first, again = meta.sample(width), meta.sample(width)
    assert first is not again
    for (name, value), (_, other) in zip(first.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(value, other), name
    with torch.no_grad():
        assert torch.allclose(first(X), meta(X, width), atol=1e-6)
    noisy = meta.sample(width, draws=3)
    assert not torch.equal(noisy[0].weight, first[0].weight)
    assert torch.equal(noisy[0].weight, meta.sample(width, draws=3)[0].weight)
    assert torch.equal(noisy[4].weight, first[4].weight)  # what is not generated has no noise


def test_gradients_reach_the_functions_by_the_chain_rule() -> None:
    meta = _meta().double()
    x = X[:2].double()
    tensors = meta.tensors(5)
    out = functional_call(meta._skeleton(5), tensors, (x,)).square().sum()
    inner = torch.autograd.grad(out, [tensors[name] for name in meta.names], retain_graph=True)
    parameters = list(meta.fields.parameters())
    expected = torch.autograd.grad([tensors[name] for name in meta.names], parameters, inner)
    found = torch.autograd.grad(meta(x, 5).square().sum(), parameters)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-10)
    # Numerically, along one direction.
    direction = [torch.randn_like(value) for value in parameters]
    slope = sum(float((a * b).sum()) for a, b in zip(found, direction, strict=True))
    ends = []
    for sign in (1, -1):
        moved = copy.deepcopy(meta)
        with torch.no_grad():
            for value, step in zip(moved.fields.parameters(), direction, strict=True):
                value.add_(sign * 1e-6 * step)
            ends.append(float(moved(x, 5).square().sum()))
    assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(slope, rel=1e-4)


def test_the_distance_from_the_teacher_by_hand() -> None:
    meta = _meta()
    far, size = meta.losses()
    made = meta.tensors(8)
    parts = []
    for place, name in enumerate(meta.names):
        wanted = meta.wanted(place)
        parts.append(float((wanted.abs() / wanted.abs().max() * (made[name] - wanted) ** 2).mean().detach()))
    assert float(far.detach()) == pytest.approx(sum(parts) / 3, rel=1e-5)
    assert float(size.detach()) == pytest.approx(
        sum(float(made[name].detach().norm()) for name in meta.names), rel=1e-5
    )


def test_training_moves_the_functions_alone_and_leaves_widths_out() -> None:
    meta = _meta(leave_out=(6,))  # type: ignore[arg-type]
    assert meta.widths == (4, 5, 7, 8)
    before = copy.deepcopy(meta.state_dict())
    y = torch.randint(2, (5,))
    task = Task(_family(8), (X, y), (X, y), (X, y), F.cross_entropy, lambda out, t: out[:, 0], batch_size=5)
    losses = meta.fit(task, steps=40, lr=1e-2)
    assert losses[-1] < losses[0]
    for name, value in meta.state_dict().items():
        assert torch.equal(value, before[name]) is not name.startswith("fields"), name
    twin = copy.deepcopy(meta)
    assert torch.equal(twin.sample(6)[0].weight, meta.sample(6)[0].weight)


def test_the_functions_that_are_kept_are_a_running_average(monkeypatch: pytest.MonkeyPatch) -> None:
    y = torch.randint(2, (5,), generator=torch.Generator().manual_seed(0))
    task = Task(_family(8), (X, y), (X, y), (X, y), F.cross_entropy, lambda out, t: out[:, 0], batch_size=5)
    seen: list[torch.Tensor] = []
    meta = _meta()

    def watched(*args: object, **settings: object) -> object:
        follow = settings["on_step"]

        def both(step: int, loss: float) -> None:
            follow(step, loss)  # type: ignore[operator]
            seen.append(meta.fields[0].last.weight.detach().clone())

        return train(*args, **{**settings, "on_step": both})  # type: ignore[arg-type]

    monkeypatch.setattr("torchgraft.elastic.neural_metamorphosis.train", watched)
    meta.fit(task, steps=6, lr=1e-2, decay=0.5)
    wanted = _meta().fields[0].last.weight.detach().clone()
    for step, value in enumerate(seen, 1):
        rate = min(0.5, step / (step + 10))
        wanted = rate * wanted + (1 - rate) * value
    assert torch.allclose(meta.fields[0].last.weight, wanted, atol=1e-6)
    assert not torch.allclose(wanted, seen[-1], atol=1e-5)


def test_training_draws_widths_and_moves_coordinates(monkeypatch: pytest.MonkeyPatch) -> None:
    y = torch.randint(2, (5,), generator=torch.Generator().manual_seed(0))
    task = Task(_family(8), (X, y), (X, y), (X, y), F.cross_entropy, lambda out, t: out[:, 0], batch_size=5)
    meta = _meta(noise=0.7)
    drawn: list[tuple[int, float]] = []
    plain = NeuMeta.tensors

    def watched(self: NeuMeta, width: int, *, noise: float = 0.0) -> dict[str, torch.Tensor]:
        drawn.append((width, noise))
        return plain(self, width, noise=noise)

    monkeypatch.setattr(NeuMeta, "tensors", watched)
    meta.fit(task, steps=30)
    assert {width for width, noise in drawn if noise} == {4, 5, 6, 7, 8}
    assert {noise for _, noise in drawn} == {0.0, 0.7}
    assert {width for width, noise in drawn if not noise} == {8}  # the distance from the teacher has none


def test_what_has_no_coordinates_is_refused() -> None:
    with pytest.raises(BadInput, match="teacher"):
        NeuMeta(_family, (4, 8), _family(7), 8)
    with pytest.raises(BadInput, match="depends on the width"):
        NeuMeta(lambda width: nn.Linear(2, 2), (4, 8), nn.Linear(2, 2), 8)
    normed = lambda width: nn.Sequential(nn.Conv2d(1, width, 1), nn.BatchNorm2d(width))  # noqa: E731
    with pytest.raises(BadInput, match="fold"):
        NeuMeta(normed, (4, 8), normed(8), 8)
    with pytest.raises(BadInput, match="left"):
        NeuMeta(_family, (8, 8), _family(8), 8, leave_out=(8,))
    with pytest.raises(BadInput, match="rise"):
        NeuMeta(_family, (8, 4), _family(8), 8)
    meta = _meta()
    with pytest.raises(BadInput, match="width"):
        meta.sample(0)
    with pytest.raises(BadInput, match="draws"):
        meta.sample(4, draws=0)
