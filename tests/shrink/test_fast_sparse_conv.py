"""Gradual block pruning, the step to sparse layers, and which layers the procedure leaves dense."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.meters import Ratio, macs, size
from torchgraft.bench.task import Task
from torchgraft.bench.training import supervised, train
from torchgraft.engines.masks import make_permanent
from torchgraft.engines.sparse import Crossover, SparseLinear, SparsePointwiseConv, timing
from torchgraft.engines.surgery.edits import history
from torchgraft.errors import BadInput
from torchgraft.shrink.prune.fast_sparse_conv import (
    FastSparseConv,
    Schedule,
    benchmark,
    sparsify_pointwise,
    to_sparse,
)


class Separable(nn.Module):
    """Stem, two depthwise-separable blocks, classifier."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.depth1 = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.point1 = nn.Conv2d(width, 2 * width, 1)
        self.depth2 = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.point2 = nn.Conv2d(2 * width, 2 * width, 1)
        self.head = nn.Linear(2 * width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.point1(F.relu(self.depth1(F.relu(self.stem(x))))).relu()
        out: Tensor = self.head(self.point2(F.relu(self.depth2(x))).relu().mean((2, 3)))
        return out


def _task(model: nn.Module, *shape: int) -> Task:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(16, *shape, generator=draw), torch.randint(0, 4, (16,), generator=draw)
    return Task(
        model, (x, y), (x, y), (x, y), F.cross_entropy, lambda out, t: (out.argmax(1) == t).float(), batch_size=8
    )


@given(st.integers(0, 50), st.integers(1, 60), st.floats(0.0, 0.5), st.floats(0.5, 0.99))
def test_schedule_hits_both_ends_and_never_falls(start: int, length: int, initial: float, final: float) -> None:
    plan = Schedule(start, start + length, initial=initial)
    path = [plan.at(step, final) for step in range(start + length + 5)]
    assert path[start] == pytest.approx(initial)
    assert path[start + length] == pytest.approx(final)
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(path))
    assert plan.due(start)
    assert plan.due(start + length)
    assert not plan.due(start + length + 1)


def test_schedule_is_the_papers_cube() -> None:
    plan = Schedule(10, 50, every=8, initial=0.1)  # five prunings
    for number in range(6):
        expected = 0.9 + (0.1 - 0.9) * (1 - 8 * number / 40) ** 3
        assert plan.at(10 + 8 * number, 0.9) == pytest.approx(expected, rel=1e-12)
    assert plan.at(30, 0.9) == pytest.approx(0.8)  # most goes early: seven eighths half-way


@pytest.mark.parametrize("block", [1, 2, 4])
def test_masks_are_constant_inside_blocks_and_exact(block: int) -> None:
    torch.manual_seed(0)
    model = Separable()
    before = copy.deepcopy(model)
    pruning = sparsify_pointwise(model, 0.8, block=block)
    assert pruning.names == ("point1", "point2")
    for name in pruning.names:
        weight = model.get_submodule(name).weight.detach().flatten(1)
        zero = (weight == 0).view(-1, block, weight.shape[1])
        assert bool((zero == zero[:, :1]).all())
        assert abs(int((~zero[:, 0]).sum()) - 0.2 * zero[:, 0].numel()) <= 0.5
        dense = before.get_submodule(name).weight.detach().flatten(1)
        kept = zero[:, 0].logical_not()
        scores = dense.abs().view(-1, block, dense.shape[1]).sum(1)
        assert scores[kept].min() >= scores[~kept].max()
    for name in ("stem", "depth1", "depth2", "head"):
        assert torch.equal(model.get_submodule(name).weight, before.get_submodule(name).weight)


def test_gradual_pruning_follows_the_schedule_and_forgives() -> None:
    torch.manual_seed(0)
    model = Separable(8)
    task = _task(model, 1, 5, 5)
    pruning = sparsify_pointwise(model, 0.9, block=2, schedule=Schedule(2, 8, every=2))
    seen: list[float] = []

    def on_step(step: int, loss: float) -> None:
        pruning.update(step, loss)
        seen.append(round(float((model.point2.weight == 0).float().mean()), 3))

    train(model, task.train, supervised(F.cross_entropy), steps=10, batch_size=8, lr=1e-2, seed=0, on_step=on_step)
    expected = [Schedule(2, 8).at(step - step % 2, 0.9) if step >= 2 else 0.0 for step in range(1, 11)]
    assert all(abs(found - wanted) <= 2 / 256 + 1e-3 for found, wanted in zip(seen, expected, strict=True))
    assert pruning.sparsity == pytest.approx(0.9)
    # A block that was masked comes back when the weight under the mask is large: masks are chosen on what is trained.
    weight = dict(model.point2.named_parameters())["parametrizations.weight.original"]
    weight.data[:2, 0] = 100.0
    pruning.update(8)
    assert bool((model.point2.weight[:2, 0] == 100.0).all())


@pytest.mark.parametrize("block", [1, 2, 4])
def test_sparse_model_equals_the_masked_one_on_odd_images(block: int) -> None:
    torch.manual_seed(0)
    model = Separable().eval()
    sparsify_pointwise(model, 0.85, block=block)
    made = to_sparse(model, block=block).eval()
    masked = make_permanent(copy.deepcopy(model)).eval()
    assert isinstance(made.point1, SparsePointwiseConv)
    assert isinstance(made.head, nn.Linear)
    for shape in ((1, 1, 7, 5), (3, 1, 9, 9)):
        x = torch.randn(shape)
        with torch.no_grad():
            assert torch.allclose(made(x), masked(x), atol=1e-5)
        pixels = shape[0] * shape[2] * shape[3]
        saved = sum(
            masked.get_submodule(n).weight.numel() - made.get_submodule(n).values.numel() for n in ("point1", "point2")
        )
        assert macs(masked, x) - macs(made, x) == saved * pixels
    (edit,) = history(made)
    assert set(edit.describe()) == {"point1", "point2"}
    assert size(made) < size(masked)


def test_to_sparse_leaves_what_has_few_zeros() -> None:
    torch.manual_seed(0)
    model = Separable()
    sparsify_pointwise(model, 0.4)
    made = to_sparse(model)
    assert type(made.point1) is nn.Conv2d
    assert history(made) == ()
    assert int((made.point1.weight == 0).sum()) > 0  # the masks are made permanent all the same
    with pytest.raises(BadInput, match="benchmark needs a model with sparse layers"):
        benchmark(made, torch.randn(1, 1, 5, 5))


def test_linear_layers_on_request_and_bad_settings() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    assert sparsify_pointwise(model, 0.5, linear=True).names == ("1",)
    with pytest.raises(BadInput, match="no 1x1 convolution"):
        sparsify_pointwise(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)))
    for wrong in ({"block": 3}, {"sparsity": 1.0}, {"sparsity": -0.5}):
        with pytest.raises(BadInput, match="block must be 1, 2 or 4"):
            sparsify_pointwise(model, linear=True, **wrong)
    for settings in ({"block": 8}, {"most": 1.0}):
        with pytest.raises(BadInput, match="most"):
            FastSparseConv(**settings)


def test_benchmark_says_time_and_crossover() -> None:
    torch.manual_seed(0)
    model = Separable().eval()
    sparsify_pointwise(model, 0.9, block=4)
    rows = benchmark(to_sparse(model, block=4).eval(), torch.randn(2, 1, 4, 4), rounds=3)
    assert [row.name for row in rows] == ["point1", "point2"]
    assert all(row.columns == 32 and row.ratio.value > 0 and 0 <= row.crossover <= 1 for row in rows)
    assert "of its dense time; faster from" in str(rows[0])


def _meets(sparsity: float) -> Crossover:
    return Crossover(((0.0, Ratio.exact(0.0)), (1.0 - sparsity, Ratio.exact(0.98))))


def test_layers_below_their_crossover_are_left_dense_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Separable(16).eval()
    task = _task(model, 1, 5, 5)
    given: list[tuple[int, ...]] = []

    def crossover(
        rows: int, columns: int, block: tuple[int, int], shape: tuple[int, ...], *, tokens: bool
    ) -> Crossover:
        given.append(shape)
        assert block == (4, 1)
        assert not tokens
        return _meets(0.8) if columns == 32 else Crossover(((0.05, Ratio.exact(1.3)), (0.25, Ratio.exact(2.0))))

    monkeypatch.setattr(timing, "crossover", crossover)
    procedure = FastSparseConv(most=0.95)
    assert [site.name for site in procedure.applies_to(model, task)] == ["point2"]
    assert given == [(16, 16, 5, 5), (16, 32, 5, 5)] or {shape[2:] for shape in given} == {(5, 5)}
    words = {refusal.name: refusal.reason for refusal in procedure.refusals(model, task)}
    assert words["point1"] == "left dense: 95% sparse it takes 1.30x of its dense time on this machine"
    assert "up to a sparsity of 80%" in words["point2"]
    below, above = procedure.apply(model, task, 0.4), procedure.apply(model, task, 0.9)  # 1 - 0.05^s: 0.70 and 0.93
    assert history(below) == ()
    assert type(below.point2) is nn.Conv2d
    assert type(above.point1) is nn.Conv2d
    assert isinstance(above.point2, SparsePointwiseConv)
    assert above.point2.backend == "auto"
    assert above.point2.sparsity == pytest.approx(1 - 0.05**0.9, abs=1e-2)


def test_exact_costs_take_no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    def clock(*_: object, **__: object) -> Crossover:
        raise AssertionError("timed")

    monkeypatch.setattr(timing, "crossover", clock)
    model = Separable().eval()
    task = _task(model, 1, 5, 5)
    procedure = FastSparseConv().for_costs(("macs", "size"))
    assert not procedure.timed
    assert FastSparseConv().for_costs(("latency", "size")).timed
    assert procedure.refusals(model, task) == []
    made = procedure.apply(model, task, 1.0)
    assert isinstance(made.point1, SparsePointwiseConv)
    assert made.point1.backend == "kernel"
    assert size(made) < size(model)
    assert macs(made, task.example) < macs(model, task.example)


def test_first_last_tied_and_foreign_layers_stay() -> None:
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(5)), nn.Linear(16, 4)).eval()
    model[3].weight = model[2].weight
    task = _task(model, 16)
    assert [site.name for site in FastSparseConv(timed=False).applies_to(model, task)] == ["1", "4"]
    assert [site.name for site in FastSparseConv(timed=False).applies_to(model, task, ignore=["1"])] == ["4"]
    made = FastSparseConv(timed=False).apply(model, task, 1.0)
    assert isinstance(made[1], SparseLinear)
    assert type(made[0]) is type(made[5]) is nn.Linear
    assert FastSparseConv()._foreign(nn.Linear(2, 2).double())
