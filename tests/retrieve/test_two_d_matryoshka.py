"""The loss on a grid of layers and sizes: its parts, its expectation, and the ranking losses by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from torchgraft.bench.models import TwoTower
from torchgraft.bench.task import Task
from torchgraft.bench.tasks.stdlib_search import contrast, first_rank
from torchgraft.engines.nesting.exits import exits
from torchgraft.engines.nesting.nested import Nested
from torchgraft.errors import BadInput
from torchgraft.retrieve.two_d_matryoshka import MatryoshkaGrid, TwoDMatryoshka, angle, cosent, in_batch_contrast


def _views(layers: int = 3, width: int = 8, seed: int = 0) -> dict[int, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        layer: torch.randn(5, width, generator=draw, dtype=torch.float64).requires_grad_(True)
        for layer in range(1, layers + 1)
    }


def test_at_the_full_setting_the_loss_is_a_multiple_of_the_base_loss() -> None:
    a, b = _views(), _views(seed=1)
    grid = MatryoshkaGrid(in_batch_contrast, weight=0.0)
    assert float(grid.at((a, b), 3, 8).detach()) == pytest.approx(
        4 * float(in_batch_contrast(a[3], b[3]).detach()), abs=1e-12
    )
    aligned = MatryoshkaGrid(in_batch_contrast, weight=1.0)
    assert torch.allclose(aligned.at((a, b), 3, 8), grid.at((a, b), 3, 8))  # a layer does not diverge from itself
    assert not torch.allclose(aligned.at((a, b), 1, 8), grid.at((a, b), 1, 8))


@given(shift=st.floats(-5, 5), seed=st.integers(0, 50))
@settings(max_examples=20, deadline=None)
def test_alignment_vanishes_for_constant_differences_alone(shift: float, seed: int) -> None:
    deep = _views(seed=seed)[3].detach()
    none = MatryoshkaGrid(lambda a: a.sum() * 0, weight=1.0)
    assert float(none.at(({1: deep + shift, 3: deep},), 1, 4)) == pytest.approx(0.0, abs=1e-12)
    bent = deep + torch.linspace(0, 1, 8, dtype=torch.float64)
    assert float(none.at(({1: bent, 3: deep},), 1, 4)) > 1e-3


def test_the_sampled_gradient_is_unbiased() -> None:
    a, b = _views(), _views(seed=1)
    values = [*a.values(), *b.values()]

    def gradient(loss: Tensor) -> Tensor:
        found = torch.autograd.grad(loss, values, allow_unused=True, retain_graph=True)
        return torch.cat([torch.zeros(40) if g is None else g.flatten() for g in found])

    sampled = MatryoshkaGrid(in_batch_contrast, sizes=(2, 4, 8), depth_weight="log")
    draws = [([layer], [size]) for layer in (1, 2) for size in (2, 4, 8)]
    mean = torch.stack([gradient(sampled.mean((a, b), *draw)) for draw in draws]).mean(0)
    whole = MatryoshkaGrid(in_batch_contrast, sizes=(2, 4, 8), depth_weight="log", layers="list", dims="list")
    assert torch.allclose(mean, gradient(whole(a, b)), atol=1e-13)
    assert float(mean.abs().max()) > 1e-3
    drawn = [sampled.draw(3, 8) for _ in range(600)]
    counts = [sum(each == draw for each in drawn) / 600 for draw in draws]
    assert counts == pytest.approx([1 / 6] * 6, abs=0.06)


def test_deeper_layers_weigh_less_where_asked() -> None:
    a = _views()
    base = lambda x: x.square().sum()  # noqa: E731
    plain, log = (MatryoshkaGrid(base, align=None, depth_weight=rule) for rule in ("none", "log"))  # type: ignore[arg-type]
    shallow = float((base(a[2]) + base(a[2][:, :4])).detach())
    difference = float((plain.at((a,), 2, 4) - log.at((a,), 2, 4)).detach())
    assert difference == pytest.approx(shallow * (1 - 1 / (1 + math.log(2))), rel=1e-9)


def test_sizes_are_halves_down_to_eight() -> None:
    grid = MatryoshkaGrid(in_batch_contrast)
    assert grid.sizes_of(64) == (8, 16, 32, 64)
    assert grid.sizes_of(12) == (12,)
    assert grid.draw(1, 8)[0] == []  # an encoder of one layer has no shallow one
    assert torch.isfinite(grid({1: torch.randn(3, 8)}, {1: torch.randn(3, 8)}))


def test_ranking_losses_by_hand() -> None:
    left = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    angles = (0.3, 1.1)
    right = torch.tensor([[math.cos(t), math.sin(t)] for t in angles], dtype=torch.float64)
    better_first, better_last = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    gap = math.cos(0.3) - math.cos(1.1)
    assert float(cosent(left, right, better_first, scale=2.0)) == pytest.approx(math.log1p(math.exp(-2 * gap)))
    assert float(cosent(left, right, better_last, scale=2.0)) == pytest.approx(math.log1p(math.exp(2 * gap)))
    # One complex coordinate each: the angle of the quotient is the angle between the vectors.
    assert float(angle(left, right, better_first, scale=2.0)) == pytest.approx(math.log1p(math.exp(-2 * 0.8)))
    assert float(angle(3 * left, right, better_last, scale=2.0)) == pytest.approx(math.log1p(math.exp(2 * 0.8)))
    assert float(cosent(left, right, torch.ones(2))) == 0.0


def test_bad_settings_are_refused() -> None:
    for bad in (
        {"layers": "all"},
        {"align": "mse"},
        {"depth_weight": "linear"},
        {"weight": -1.0},
        {"sizes": ()},
    ):
        with pytest.raises(BadInput):
            MatryoshkaGrid(in_batch_contrast, **bad)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="same layers"):
        MatryoshkaGrid(in_batch_contrast)({1: torch.zeros(2, 8)}, {2: torch.zeros(2, 8)})
    for wrong in ({"layers": "all"}, {"sizes": (0,)}, {"weight": -1.0}, {"lr": -1.0}):
        with pytest.raises(BadInput):
            TwoDMatryoshka(**wrong)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="even"):
        angle(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2))


def _towers() -> tuple[TwoTower, Task]:
    torch.manual_seed(0)
    model = TwoTower(32, 4, 6, d_model=16, depth=3, num_heads=2).double()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn_like(value))
    pairs = ((torch.randint(1, 32, (6, 4)), torch.randint(1, 32, (6, 6))), torch.arange(6))
    return model, Task(model, pairs, pairs, pairs, contrast, first_rank, batch_size=6)


def _by_hand(model: TwoTower, task: Task, layer: int, dim: int, weight: float) -> Tensor:
    """Return the loss of one layer and size, each of its four parts by a pass of its own."""

    def vectors(layers: int) -> list[Tensor]:
        found = []
        for tower, tokens in zip((model.query_encoder, model.code_encoder), task.train.inputs, strict=True):
            x = tower.embed(tokens) + tower.position[:, : tokens.shape[1]]
            for block in list(tower.blocks)[:layers]:
                x = block(x)
            found.append(tower.norm(x).mean(1))
        return found

    def base(layers: int, size: int) -> Tensor:
        a, b = (F.normalize(each[:, :size], dim=-1) for each in vectors(layers))
        logits, right = a @ b.T * model.log_scale.exp(), torch.arange(6)
        return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2

    sides = []
    for deep, shallow in zip(vectors(3), vectors(layer), strict=True):
        p, q = torch.softmax(deep, -1), torch.softmax(shallow, -1)
        sides.append((p * (p / q).log()).sum(-1).mean())
    return base(3, 16) + base(3, dim) + base(layer, 16) + base(layer, dim) + weight * sum(sides) / 2


def test_the_loss_of_a_step_and_its_gradient_by_hand() -> None:
    model, task = _towers()
    found = exits(model, task.train.inputs)
    procedure = TwoDMatryoshka(layers="list", dims="list", weight=0.7)
    loss = procedure.objective(found, task, seed=0)(Nested(model, [[]]), task.train.inputs, task.train.target, None)  # type: ignore[arg-type]
    by_hand = torch.stack([_by_hand(model, task, layer, dim, 0.7) for layer in (1, 2) for dim in (8, 16)]).mean()
    assert float(loss.detach()) == pytest.approx(float(by_hand.detach()), abs=1e-12)
    first, second = (torch.autograd.grad(each, list(model.parameters())) for each in (loss, by_hand))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(first, second, strict=True))
    still = {name for (name, _), g in zip(model.named_parameters(), first, strict=True) if float(g.abs().max()) < 1e-9}
    assert all(name.endswith("key.bias") for name in still)  # a softmax does not see what it adds to all scores


def test_a_step_draws_one_shallow_layer_and_one_size() -> None:
    model, task = _towers()
    objective = TwoDMatryoshka().objective(exits(model, task.train.inputs), task, seed=0)
    nested = Nested(model, [[]])
    with torch.no_grad():
        known = [float(_by_hand(model, task, layer, dim, 1.0)) for layer in (1, 2) for dim in (8, 16)]
        drawn = [float(objective(nested, task.train.inputs, task.train.target, None)) for _ in range(40)]  # type: ignore[arg-type]
    places = [min(range(4), key=lambda place: abs(known[place] - value)) for value in drawn]
    assert all(abs(known[place] - value) < 1e-12 for place, value in zip(places, drawn, strict=True))
    assert set(places) == {0, 1, 2, 3}


def test_the_menu_has_every_layer_below_the_last_and_the_whole_width() -> None:
    assert TwoDMatryoshka().menu(3, 32) == ((1, (8, 16, 32)), (2, (8, 16, 32)))
    assert TwoDMatryoshka(sizes=(4,)).menu(2, 32) == ((1, (4, 32)),)
    _, task = _towers()
    too_wide = TwoDMatryoshka(sizes=(64,))
    assert not too_wide.applies_to(task.trained(), task)
    assert "asks for" in too_wide.refusals(task.trained(), task)[0].reason
