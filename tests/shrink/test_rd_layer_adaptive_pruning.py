"""Rate-distortion allocation: brute force, budgets, exact and approximate additivity, the ends of the curves."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torchgraft.bench.models import VisionTransformer
from torchgraft.bench.task import Task
from torchgraft.engines.masks import keep_best, magnitude, make_permanent, sparsity
from torchgraft.engines.width import study
from torchgraft.errors import BadInput
from torchgraft.shrink.prune.rd_layer_adaptive_pruning import (
    RDLayerAdaptivePruning,
    RDPruner,
    allocate,
    keep_counts,
    rd_curves,
)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), layers=st.integers(1, 4), target=st.floats(0.01, 1))
def test_allocation_equals_brute_force(seed: int, layers: int, target: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    names = [f"l{i}" for i in range(layers)]
    curves = {n: torch.rand(6, generator=generator, dtype=torch.float64).cumsum(0) for n in names}
    curves = {n: curve - curve[0] for n, curve in curves.items()}
    sizes = {n: int(torch.randint(1, 1000, (), generator=generator)) for n in names}
    found = allocate(curves, sizes, target)
    total = sum(sizes.values())
    best = min(
        sum(float(curves[n][level]) for n, level in zip(names, levels, strict=True))
        for levels in itertools.product(range(6), repeat=layers)
        if sum(sizes[n] * level / 5 for n, level in zip(names, levels, strict=True))
        >= target * total * (1 - 1e-9) - 1e-9
    )
    assert sum(float(curves[n][round(found[n] * 5)]) for n in names) == pytest.approx(best, rel=1e-9, abs=1e-12)
    removed = sum(found[n] * sizes[n] for n in names)
    # Curves rise strictly, so what is removed beyond the target is less than any step that could be taken back.
    steps = [sizes[n] / 5 for n in names if found[n] > 0]
    assert target * total * (1 - 1e-9) <= removed < target * total + min(steps, default=1e-9) + 1e-9


def test_earlier_ratios_are_never_undercut() -> None:
    curves = {"a": torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]), "b": torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4])}
    sizes = {"a": 100, "b": 100}
    assert allocate(curves, sizes, 0.5) == {"a": 0.0, "b": 1.0}
    assert allocate(curves, sizes, 0.5, monotone_from={"a": 0.5, "b": 0.0}) == {"a": 0.5, "b": 0.5}
    with pytest.raises(BadInput, match="target_sparsity"):
        allocate(curves, sizes, 1.2)


def test_a_curve_that_falls_counts_as_its_running_maximum() -> None:
    curves = {"a": torch.tensor([0.0, 5.0, 1.0]), "b": torch.tensor([0.0, 2.0, 4.0])}
    assert allocate(curves, {"a": 100, "b": 100}, 0.5) == {"a": 0.0, "b": 1.0}


class _TwoBranches(nn.Module):
    """The sum of two linear maps of two halves of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(6, 4, bias=False)
        self.right = nn.Linear(6, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x[:, :6]) + self.right(x[:, 6:])


def _pruned(model: nn.Module, ratios: dict[str, float]) -> nn.Module:
    changed = copy.deepcopy(model)
    weights = dict(changed.named_parameters())
    chosen = {name: weights[name].detach() for name in ratios}
    masks = keep_best(magnitude(chosen), keep_counts(ratios, chosen))
    with torch.no_grad():
        for name, mask in masks.items():
            weights[name].mul_(mask)
    return changed


def test_distortions_of_independent_branches_add_up_exactly() -> None:
    torch.manual_seed(0)
    model = _TwoBranches().double()
    half = torch.randn(500, 6, dtype=torch.float64)
    other = torch.randn(500, 6, dtype=torch.float64)
    # Every pairing of a left half with plus and minus a right half: the cross term is zero in this expectation.
    x = torch.cat([torch.cat([half, other], 1), torch.cat([half, -other], 1)])
    curves = rd_curves(model, x, levels=5)
    for left, right in ((1, 2), (3, 1), (4, 4)):
        cut = _pruned(model, {"left.weight": left / 4, "right.weight": right / 4})
        joint = (cut(x) - model(x)).square().sum(1).mean()
        single = curves["left.weight"][left] + curves["right.weight"][right]
        torch.testing.assert_close(joint.detach(), single, rtol=1e-12, atol=1e-14)


def test_small_distortions_of_a_deep_network_nearly_add_up() -> None:
    torch.manual_seed(0)
    sizes = (32, 64, 64, 64, 10)
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    model = nn.Sequential(*layers[:-1]).double()
    x = torch.randn(400, 32, dtype=torch.float64)
    curves = rd_curves(model, x, levels=11)
    with torch.no_grad():
        joint = (_pruned(model, dict.fromkeys(curves, 0.1))(x) - model(x)).square().sum(1).mean()
    assert float(joint) == pytest.approx(sum(float(curve[1]) for curve in curves.values()), rel=0.15)


def test_ends_of_the_curves_and_the_model_is_left_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)).double().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(7, 1, 4, 4, dtype=torch.float64)
    mean, worst = rd_curves(model, x, levels=4), rd_curves(model, x, levels=4, worst_case=True)
    for name in ("0.weight", "3.weight"):
        empty = copy.deepcopy(model)
        with torch.no_grad():
            dict(empty.named_parameters())[name].zero_()
            change = (empty(x) - model(x)).square().sum(1)
        assert mean[name][0] == 0.0
        torch.testing.assert_close(mean[name][-1], change.mean(), rtol=1e-12, atol=0)
        torch.testing.assert_close(worst[name][-1], change.max(), rtol=1e-12, atol=0)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_rounds_of_pruning_only_ever_remove() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 3))
    pruner = RDPruner(model, torch.randn(32, 8), levels=21)
    gone: dict[str, Tensor] = {}
    ratios: dict[str, float] = {}
    for target in (0.3, 0.6, 0.9):
        now = pruner.prune_(target)
        total = 8 * 20 + 20 * 30 + 30 * 3
        assert target - 0.01 <= sparsity(model) <= target + 600 / 20 / total + 0.01
        zeros = {name: module.weight == 0 for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        assert all(bool((zeros[name] >= gone[name]).all()) for name in gone)
        assert all(now[name] >= ratios[name] for name in ratios)
        gone, ratios = zeros, now
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)  # masks hold through training
        F.cross_entropy(model(torch.randn(16, 8)), torch.randint(0, 3, (16,))).backward()
        optimiser.step()
        assert all(bool((module.weight[gone[name]] == 0).all()) for name, module in _linears(model))
    make_permanent(model)
    assert type(model[0]) is nn.Linear
    assert isinstance(model[0].weight, nn.Parameter)


def _linears(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "in_features")]


def _correct(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(-1) == target).float()


@pytest.fixture(scope="module")
def task() -> Task:
    torch.manual_seed(0)
    model = VisionTransformer(image_size=4, d_model=16, depth=2, num_heads=2).eval()
    data = (torch.randn(40, 1, 4, 4), torch.randint(0, 10, (40,)))
    return Task(model, data, data, data, F.cross_entropy, _correct)


def test_structured_cuts_are_nested_and_follow_the_curves(task: Task) -> None:
    model = task.trained()
    procedure = RDLayerAdaptivePruning(levels=5, samples=16)
    found = study(model, task)
    scores = procedure.scores(found, task, seed=0)
    path = procedure.path(found, scores, task, seed=0)
    for before, after in itertools.pairwise(path):
        assert all(after[name] <= before[name] for name in after)
    costs = [found.cost(procedure.keep(model, task, strength)) for strength in (0.1, 0.25, 0.5, 0.75, 1.0)]
    assert costs == sorted(costs, reverse=True)
    curves = procedure.curves(found, scores, task, seed=0)
    assert all(curve[0] == 0.0 and curve == sorted(curve) for curve in curves.values())
    # A group that the output does not feel is the first to be cut to its floor.
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight.zero_()
    kept = procedure.keep(model, task, 0.2)
    size = found.groups["blocks.1.mlp.fc1"].size
    assert len(kept["blocks.1.mlp.fc1"]) == procedure.ladders(found)["blocks.1.mlp.fc1"][-1] < size


def test_structured_criterion_by_magnitude_needs_no_labels(task: Task) -> None:
    model = task.trained()
    found = study(model, task)
    scores = RDLayerAdaptivePruning(criterion="magnitude").scores(found, task, seed=0)
    weight = model.blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc1.bias, model.blocks[0].mlp.fc2.weight
    expected = weight[0].square().sum(1) + weight[1].square() + weight[2].square().sum(0)
    torch.testing.assert_close(scores["blocks.0.mlp.fc1"].float(), expected.detach(), rtol=1e-5, atol=1e-6)
    with pytest.raises(BadInput, match="criterion"):
        RDLayerAdaptivePruning(criterion="luck")  # type: ignore[arg-type]  # the point of the test
