"""Widths as choices: interpolation, pairs, costs against enumeration, certain choices against sliced networks."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.meters import macs
from torchgraft.bench.models import ResidualNet
from torchgraft.bench.task import Split, Task
from torchgraft.engines.staged_search import Architecture, StagedCNN, expected_macs, staged_macs, supernet
from torchgraft.engines.surgery.edits import apply_edits
from torchgraft.engines.width import Study, prepare
from torchgraft.engines.width_search import Relaxation, channel_interpolate, cost_loss, draw_two, units_of
from torchgraft.errors import BadInput
from torchgraft.shrink.prune.transformable_architecture_search import (
    TransformableArchitectureSearch,
    tas_prune,
    transfer,
)


def _task(model: nn.Module, count: int = 24) -> Task:
    draw = torch.Generator().manual_seed(0)
    split = Split(torch.randn(count, 1, 8, 8, generator=draw), torch.randint(10, (count,), generator=draw))
    return Task(model, split, split, split, F.cross_entropy, lambda o, t: (o.argmax(-1) == t).float(), batch_size=8)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12))
def test_interpolation_is_the_adaptive_pool_along_channels(before: int, after: int) -> None:
    x = torch.randn(2, before, 3, 2, dtype=torch.float64)
    expected = F.adaptive_avg_pool1d(x.flatten(2).transpose(1, 2), after).transpose(1, 2).reshape(2, after, 3, 2)
    torch.testing.assert_close(channel_interpolate(x, after), expected, rtol=0, atol=1e-12)
    ones = channel_interpolate(torch.full_like(x, 2.5), after)
    torch.testing.assert_close(ones, torch.full_like(ones, 2.5), rtol=0, atol=1e-12)


def test_interpolation_averages_blocks_and_is_the_identity() -> None:
    x = torch.arange(6.0).reshape(1, 6)
    assert channel_interpolate(x, 3).tolist() == [[0.5, 2.5, 4.5]]
    assert channel_interpolate(x, 6) is x
    assert channel_interpolate(x[:, :2], 4).tolist() == [[0.0, 0.0, 1.0, 1.0]]


def test_drawn_pairs() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0], requires_grad=True)
    seen = torch.zeros(4)
    for _ in range(300):
        places, weights = draw_two(logits, tau=1.0)
        assert len(set(places)) == 2
        assert float(weights.detach().sum()) == pytest.approx(1.0)
        seen[places] += 1
    assert seen.argsort(descending=True).tolist() == [0, 2, 1, 3]
    slope = torch.autograd.grad(weights[0], logits)[0]
    assert bool((slope[places] != 0).all())
    places, weights = draw_two(logits, tau=1.0, allowed=torch.tensor([False, False, True, False]))
    assert (places, weights.tolist()) == ([2], [1.0])


def test_cost_is_pushed_into_its_band() -> None:
    """Descent on the loss lowers the cost above the band and raises it below; inside nothing moves."""
    counts = torch.tensor([2.0, 4.0, 8.0])
    for actual, sign in ((8.0, -1), (4.0, 0), (2.0, 1)):
        logits = torch.zeros(3, requires_grad=True)
        (slope,) = torch.autograd.grad(cost_loss((torch.softmax(logits, 0) * counts).sum(), actual, 4.0), logits)
        moved = torch.softmax(-0.1 * slope, 0)
        change = float(((moved - 1 / 3) * counts).sum())
        assert (change > 1e-4) - (change < -1e-4) == sign
        assert (sign == 0) == bool((slope == 0).all())


def test_expected_macs_are_the_enumeration_of_widths_and_depths() -> None:
    torch.manual_seed(0)
    full = ((4, 3), (5, 2))
    options = [[torch.tensor([1.0, float(c)]) for c in stage] for stage in full]
    chances = [[torch.softmax(torch.randn(2, dtype=torch.float64), 0) for _ in stage] for stage in full]
    depths = [torch.softmax(torch.randn(2, dtype=torch.float64), 0) for _ in full]
    found = expected_macs(options, chances, depths, positions=(64, 16), channels=1, classes=10)
    total = 0.0
    for ends in itertools.product((0, 1), repeat=2):
        for picks in itertools.product((0, 1), repeat=4):
            p = float(depths[0][ends[0]] * depths[1][ends[1]])
            widths = []
            for stage in (0, 1):
                row = []
                for block in (0, 1):
                    pick = picks[2 * stage + block]
                    p *= float(chances[stage][block][pick])
                    row.append(int(options[stage][block][pick]))
                widths.append(tuple(row[: ends[stage] + 1]))
            total += p * macs(StagedCNN(widths), torch.zeros(1, 1, 8, 8))  # the operators that run
    assert float(found) == pytest.approx(total, rel=1e-9)


def test_certain_choices_are_the_sliced_network() -> None:
    torch.manual_seed(0)
    model, x = StagedCNN(((6, 6), (8, 8))).double().train(), torch.randn(5, 1, 8, 8, dtype=torch.float64)
    options = [[torch.tensor([2.0, 4.0, float(c)]) for c in stage] for stage in model.widths]
    picks, ends = [[1, 2], [0, 1]], [1, 0]
    widths = [[torch.full((3,), -1e4).index_fill(0, torch.tensor(p), 1e4) for p in row] for row in picks]
    depths: list[Tensor | None] = [torch.full((2,), -1e4).index_fill(0, torch.tensor(e), 1e4) for e in ends]
    chosen = Architecture(options, widths, depths)
    assert chosen.likeliest() == ((4, 6), (2,))
    sliced = model.sliced(chosen.likeliest()).double()
    blocks, drawn = chosen.draw(tau=0.1)
    blocks = [[(c, w.double()) for c, w in stage] for stage in blocks]
    output = supernet(model, x, blocks, [None if d is None else d.double() for d in drawn])
    torch.testing.assert_close(output, sliced(x), rtol=0, atol=1e-6)
    other = model.sliced(((4, 6), (3,))).double()
    assert not torch.allclose(output, other(x), atol=1e-3)


def _study() -> Study:
    torch.manual_seed(0)
    model = ResidualNet(widths=(4, 6), depth=1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.uniform_(-0.5, 0.5)
    return prepare(model, torch.zeros(2, 1, 8, 8), exact_only=True)


def test_every_index_knows_its_unit() -> None:
    study = _study()
    shapes = {name: tuple(value.shape) for name, value in study.model.state_dict().items()}
    for group in study.groups.values():
        found = units_of(study.structure, group.name, shapes)
        assert {name for name, _ in found} == set(study.structure.tensors(group.name))
        for unit in range(group.size):
            cut = study.structure.slice({group.name: [unit]})
            for (name, dim), units in found.items():
                places = [i for start, stop in cut.tensors[name][dim] for i in range(start, stop)]
                assert (units == unit).nonzero().flatten().tolist() == places


def test_masks_of_certain_widths_are_the_sliced_model_and_its_cost() -> None:
    study = _study()
    scores = {name: torch.rand(group.size) for name, group in study.groups.items()}
    options = {name: (1, 2, group.size) for name, group in study.groups.items()}
    relaxed = Relaxation(study, options, scores)
    assert relaxed.read == set(study.groups)
    x, weights = torch.randn(3, 1, 8, 8), dict(study.model.named_parameters())
    from torchgraft.engines.allocation import strongest

    for pick in range(3):
        counts = {name: each[(pick + place) % 3] for place, (name, each) in enumerate(options.items())}
        keep = strongest(scores, counts)
        drawn = {name: ([each.index(counts[name]), 0], torch.tensor([1.0, 0.0])) for name, each in options.items()}
        sliced = apply_edits(study.model, [study.structure.slice(keep)])
        output = relaxed.run(study.model, relaxed.masked(weights, drawn), x)
        torch.testing.assert_close(output, sliced(x), rtol=1e-5, atol=1e-5)
        assert relaxed.cost(counts) == pytest.approx(study.cost(keep), rel=1e-9)


def test_expected_cost_of_a_traced_model_is_the_enumeration() -> None:
    study = _study()
    scores = {name: torch.rand(group.size) for name, group in study.groups.items()}
    options = {name: (1, group.size) for name, group in study.groups.items()}
    relaxed = Relaxation(study, options, scores)
    chances = {name: torch.softmax(torch.randn(2, dtype=torch.float64), 0) for name in options}
    total = 0.0
    for picks in itertools.product((0, 1), repeat=len(options)):
        counts = {name: options[name][pick] for name, pick in zip(options, picks, strict=True)}
        p = float(torch.stack([chances[name][pick] for name, pick in zip(options, picks, strict=True)]).prod())
        total += p * study.cost({name: list(range(count)) for name, count in counts.items()})
    assert float(relaxed.expected(chances)) == pytest.approx(total, rel=1e-9)


def test_every_level_meets_its_budget_below_the_one_before() -> None:
    torch.manual_seed(0)
    model = ResidualNet(widths=(8, 8), depth=1)
    task = _task(model)
    procedure = TransformableArchitectureSearch(steps=2, levels=4, multiple=1)
    found = procedure._study(model, task, ())
    scores, path = procedure._decide(found, task, 0)
    costs = [found.cost({name: list(range(count)) for name, count in counts.items()}) for counts in path]
    for level, (counts, cost) in enumerate(zip(path, costs, strict=True)):
        assert cost <= costs[0] - (costs[0] - costs[-1]) * level / 4 + 1e-6
        if level:
            assert all(count <= path[level - 1][name] for name, count in counts.items())
    assert scores.keys() == path[0].keys()


def test_the_search_moves_towards_the_target_and_leaves_the_model() -> None:
    torch.manual_seed(0)
    model = StagedCNN(((6, 6), (6, 6)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    widths = tas_prune(model, _task(model), flops_ratio=0.3, steps=30, logit_lr=0.1)
    positions = (64, 16)
    ratio = staged_macs(model, widths, positions) / staged_macs(model, model.widths, positions)
    assert 0.15 < ratio < 0.6
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert tas_prune(model, _task(model), steps=3, search_depth=False, seed=1) == tas_prune(
        model, _task(model), steps=3, search_depth=False, seed=1
    )
    student = transfer(widths, model, _task(model), steps=2)
    assert student.widths == widths
    assert not student.training


@pytest.mark.parametrize(("alpha", "moves"), [(0.0, "labels"), (1.0, "teacher")])
def test_students_learn_from_the_labels_or_the_teacher_as_alpha_says(alpha: float, moves: str) -> None:
    torch.manual_seed(0)
    teacher, other = StagedCNN(((4,),)), StagedCNN(((4,),))
    task = _task(teacher)
    mixed = Split(task.train.inputs, task.train.target.flip(0))
    relabelled = Task(teacher, mixed, mixed, mixed, task.loss, task.score, batch_size=8)

    def weights(taught_by: StagedCNN, by: Task) -> Tensor:
        made = transfer(((3,),), taught_by, by, steps=3, alpha=alpha)
        return torch.cat([value.detach().flatten() for value in made.parameters()])

    plain = weights(teacher, task)
    assert torch.equal(plain, weights(teacher, relabelled)) == (moves == "teacher")
    assert torch.equal(plain, weights(other, task)) == (moves == "labels")


def test_bad_input() -> None:
    model = StagedCNN(((2,),))
    with pytest.raises(BadInput, match="flops_ratio"):
        tas_prune(model, _task(model), flops_ratio=1.5)
    with pytest.raises(BadInput, match="widths"):
        StagedCNN(((2,), ()))
    with pytest.raises(BadInput, match="channels"):
        channel_interpolate(torch.zeros(1, 3), 0)
    with pytest.raises(BadInput, match="steps"):
        TransformableArchitectureSearch(steps=0)
    with pytest.raises(BadInput, match="half"):
        tas_prune(model, _task(model, 1))
