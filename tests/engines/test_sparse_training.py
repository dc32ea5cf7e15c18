"""Masks that hold, change and are counted: by hand, in float64, and against optimisers that would move them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torchgraft.bench.task import Split
from torchgraft.bench.training import supervised
from torchgraft.engines import masks as scores
from torchgraft.engines.parametrize import LowRankProduct, parametrize
from torchgraft.engines.sparse_training import (
    DropGrow,
    Gradual,
    MaskedTraining,
    SparsityReport,
    SparsityTags,
    Step,
    cosine_fraction,
    drop_and_grow,
    forward_flops,
    kept_counts,
    prune_and_rewind,
    remove_lowest,
    train_masked,
    trainer,
)
from torchgraft.errors import BadInput


def _model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()


def _masks(model: nn.Module, sparsity: float = 0.5, seed: int = 0) -> dict[str, Tensor]:
    weights = scores.prunable(model)
    sizes = {name: tuple(weight.shape) for name, weight in weights.items()}
    return scores.keep_best(scores.random(weights, seed=seed), scores.erdos_renyi_kernel(sizes, sparsity))


def _loss(model: nn.Module, seed: int = 1) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (16,), generator=generator)
    return lambda: nn.functional.cross_entropy(model(x), y)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("before", [True, False])
def test_hidden_weights_are_zero_after_every_step(name: str, before: bool) -> None:
    model = _model()
    optimizer = OPTIMIZERS[name](model.parameters()) if before else None
    if before:  # momentum gathered while dense would move the weights once they are hidden
        assert optimizer is not None
        for _ in range(3):
            optimizer.zero_grad()
            _loss(model)().backward()
            optimizer.step()
    masks = _masks(model)
    training = MaskedTraining(model, optimizer or OPTIMIZERS[name](model.parameters()), masks)
    seen = {n: w.detach().clone() for n, w in scores.prunable(model).items()}
    for _ in range(5):
        training.step(_loss(model))
        for parameter, mask in masks.items():
            layer: Any = model.get_submodule(parameter.rpartition(".")[0])
            raw = layer.parametrizations.weight.original
            assert (raw[~mask] == 0).all()
            assert (layer.weight[~mask] == 0).all()
            assert any(p is raw for group in training.optimizer.param_groups for p in group["params"])
    moved = {n: w.detach() for n, w in scores.prunable(model).items()}
    assert all((moved[n] != seen[n])[masks[n]].all() for n in masks)
    assert kept_counts(model) == training.kept == {n: int(m.sum()) for n, m in masks.items()}


def test_without_clearing_momentum_would_move_what_is_hidden() -> None:
    # The negative control: the same optimiser, the mask put on by hand, moves the tensor under it.
    model = _model()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    _loss(model)().backward()
    optimizer.step()
    masks = _masks(model)
    scores.apply_masks(model, masks)
    raw = model[0].parametrizations.weight.original
    before = raw.detach().clone()
    optimizer.zero_grad()
    _loss(model)().backward()
    optimizer.step()
    assert (raw != before)[~masks["0.weight"]].all()


def test_a_weight_that_comes_back_has_no_past() -> None:
    model = _model()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    dense = {n: torch.ones_like(m) for n, m in _masks(model).items()}
    training = MaskedTraining(model, optimizer, dense)
    for _ in range(3):
        training.step(_loss(model))
    half = _masks(model)
    training.set_masks(half)
    training.step(_loss(model))
    training.set_masks(dense)
    raw = model[0].parametrizations.weight.original
    gone = ~half["0.weight"]
    assert (raw[gone] == 0).all()
    assert (optimizer.state[raw]["exp_avg"][gone] == 0).all()
    assert (optimizer.state[raw]["exp_avg_sq"][gone] == 0).all()
    assert (optimizer.state[raw]["exp_avg"][~gone] != 0).any()


def test_remove_lowest_by_hand_and_in_bounds() -> None:
    given_scores = {"a": torch.tensor([5.0, 1.0, 3.0]), "b": torch.tensor([[2.0, 9.0]])}
    masks = {"a": torch.tensor([True, True, False]), "b": torch.tensor([[True, True]])}
    found = remove_lowest(given_scores, masks, 2)
    assert found["a"].tolist() == [True, False, False]
    assert found["b"].tolist() == [[False, True]]
    assert remove_lowest({"b": given_scores["b"]}, masks, 1)["a"].tolist() == [True, True, False]
    assert all(torch.equal(masks[n], m) for n, m in remove_lowest(given_scores, masks, 0).items())
    with pytest.raises(BadInput, match=r"count must lie in \[0, 4\].*got 5"):
        remove_lowest(given_scores, masks, 5)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0, 1), density=st.floats(0.05, 1))
def test_drop_and_grow_keeps_counts_and_takes_the_best(seed: int, share: float, density: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(7, 5, generator=generator) < density
    weight = torch.randn(7, 5, generator=generator).masked_fill(~mask, 0.0)
    grow = torch.rand(7, 5, generator=generator)
    new = drop_and_grow({"w": weight}, {"w": mask}, {"w": grow}, share)["w"]
    count = int(share * int(mask.sum()))
    assert int(new.sum()) == int(mask.sum())
    stayed, gone, came = mask & new, mask & ~new, new & ~mask
    assert int(gone.sum()) == int(came.sum()) <= count
    smallest = weight.abs()[mask].sort().values[:count]
    if count:
        assert (weight.abs()[gone] <= smallest[-1]).all()
        if came.any() and (~new).any():
            assert grow[came].min() >= grow[~new & ~mask].max() if (~new & ~mask).any() else True
    assert (stayed.sum() >= mask.sum() - count).all()


def test_rigl_grows_by_the_dense_gradient_and_moves_nothing_in_that_step() -> None:
    model = _model()
    masks = _masks(model)
    change = DropGrow(end=100, fraction=0.5, every=2)
    training = MaskedTraining(model, OPTIMIZERS["sgd"](model.parameters()), masks, change=change)
    for _ in range(2):
        training.step(_loss(model))
    before = {n: w.detach().clone() for n, w in scores.prunable(model).items()}
    # By hand: the gradient of a plain dense model that has the masked weights as its own.
    plain = _model()
    plain[0].weight.data, plain[2].weight.data = before["0.weight"].clone(), before["2.weight"].clone()
    plain[0].bias.data, plain[2].bias.data = model[0].bias.detach().clone(), model[2].bias.detach().clone()
    _loss(plain)().backward()
    slopes = {"0.weight": plain[0].weight.grad.abs(), "2.weight": plain[2].weight.grad.abs()}
    share = cosine_fraction(2, end=100, fraction=0.5)
    expected = drop_and_grow(before, masks, slopes, share)
    training.step(_loss(model))
    assert training.history[-1].dense_gradient
    assert [step.dense_gradient for step in training.history] == [False, False, True]
    after = scores.prunable(model)
    for name, mask in expected.items():
        assert torch.equal(training.masks[name], mask)
        assert not torch.equal(mask, masks[name])
        assert torch.equal(after[name], before[name] * mask)
    assert model[0].bias.grad is not None  # of the step before


@pytest.mark.parametrize("grow", ["random", "gradient"])
def test_drop_and_grow_holds_the_density_at_every_step_and_stops(grow: Any) -> None:
    model = _model()
    masks = _masks(model, 0.7)
    change = DropGrow(end=20, fraction=0.4, every=3, grow=grow)
    training = MaskedTraining(model, OPTIMIZERS["adamw"](model.parameters()), masks, change=change, seed=3)
    changes = []
    for step in range(32):
        held = {n: m.clone() for n, m in training.masks.items()}
        training.step(_loss(model, step))
        assert training.kept == {n: int(m.sum()) for n, m in masks.items()}
        changes.append(any(not torch.equal(held[n], m) for n, m in training.masks.items()))
    assert any(changes[:20])
    assert not any(changes[20:])
    period = 3 + (grow == "gradient")
    assert all((step + 1) % period == 0 for step, changed in enumerate(changes) if changed)


@pytest.mark.parametrize("by_layer", [True, False])
def test_gradual_pruning_follows_the_cubic_and_nests(by_layer: bool) -> None:
    model = _model()
    sizes = {"0.weight": (8, 6), "2.weight": (3, 8)}
    final: Any = scores.erdos_renyi_kernel(sizes, 0.75) if by_layer else 0.25
    change = Gradual(final=final, start=4, end=20, every=4)
    dense = {n: torch.ones(shape, dtype=torch.bool) for n, shape in sizes.items()}
    training = MaskedTraining(model, OPTIMIZERS["sgd"](model.parameters()), dense, change=change)
    before = dense
    for step in range(24):
        training.step(_loss(model, step))
        assert all((before[n] | ~m).all() for n, m in training.masks.items())
        before = {n: m.clone() for n, m in training.masks.items()}
        whole = sum(training.kept.values())
        last = min(max(step - step % 4, 0), 20)
        expected = scores.cubic(last, start=4, end=20, final=0.75) if last >= 4 else 0.0
        assert whole == pytest.approx(72 * (1 - expected), abs=1.01)
    assert sum(training.kept.values()) == 18
    if by_layer:
        assert training.kept == final


def test_cosine_and_settings_are_checked() -> None:
    assert cosine_fraction(25, end=100) == pytest.approx(0.15 * (1 + 2**-0.5))
    for bad in ({"end": 0}, {"end": 5, "fraction": 1.5}, {"end": 5, "every": 0}, {"end": 5, "grow": "up"}):
        with pytest.raises(BadInput, match="got"):
            DropGrow(**bad)  # type: ignore[arg-type]
    for bad in ({"start": 5, "end": 5}, {"start": 0, "end": 5, "every": 0}):
        with pytest.raises(BadInput, match="gradual pruning needs"):
            Gradual(final=0.5, **bad)
    with pytest.raises(BadInput, match="final must lie"):
        Gradual(final=1.5, start=0, end=5)
    model = _model()
    with pytest.raises(BadInput, match="final must name"):
        MaskedTraining(
            model,
            OPTIMIZERS["sgd"](model.parameters()),
            _masks(model),
            change=Gradual(final={"0.weight": 3}, start=0, end=5),
        )
    low = nn.Sequential(parametrize(nn.Linear(3, 3), LowRankProduct(2)))
    with pytest.raises(BadInput, match="several parts"):
        MaskedTraining(low, torch.optim.SGD(low.parameters(), lr=0.1), {"0.weight": torch.eye(3) > 0})


class _Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(4, 3, 2, stride=2)
        self.fc = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.up(self.conv(x)).mean(dim=(2, 3)))
        return out


def test_flops_by_hand() -> None:
    model = _model()
    example = torch.zeros(7, 6, dtype=torch.float64)
    assert forward_flops(model, example) == {"0.weight": 2 * 48, "2.weight": 2 * 24}
    # 0.weight at 12 of 48 and 2.weight at 6 of 24: f_s = 24 + 12 = 36, f_d = 144
    history = [Step({"0.weight": 12, "2.weight": 6})] * 3 + [Step({"0.weight": 12, "2.weight": 6}, True)]
    report = SparsityReport(model, history, example=example)
    assert report.dense_flops == 144
    assert report.training_flops == 3 * 3 * 36 + 2 * 36 + 144
    assert report.training_share == (9 * 36 + 72 + 144) / (4 * 3 * 144)
    assert report.at(0) == {"0.weight": 0.25, "2.weight": 0.25}
    assert report.inference_flops == 144  # it is dense still
    scores.apply_masks(model, {"0.weight": torch.arange(48).reshape(8, 6) < 12})
    sparse = SparsityReport(model, history, example=example)
    assert sparse.inference_flops == 24 + 48
    assert sparse.layers == {"0.weight": 0.25, "2.weight": 1.0}
    assert sparse.density == 36 / 72
    assert "0.25" in str(sparse)
    assert SparsityReport(model, example=example).training_share == 1.0
    # conv: 8x8 places x (4 x 1 x 9) weights; transposed: 8x8 places of the input x (4 x 3 x 4); linear: once
    spatial = forward_flops(_Conv(), torch.zeros(2, 2, 8, 8))
    assert spatial == {"conv.weight": 2 * 64 * 36, "up.weight": 2 * 64 * 48, "fc.weight": 2 * 15}
    with pytest.raises(BadInput, match="no prunable weight"):
        SparsityReport(nn.ReLU(), example=torch.zeros(1, 2))
    with pytest.raises(BadInput, match="history names"):
        SparsityReport(model, [Step({"9.weight": 1})], example=example)


def test_a_new_weight_of_zero_counts_as_kept() -> None:
    model = nn.Linear(2, 2)
    scores.apply_masks(model, {"weight": torch.tensor([[True, False], [True, True]])})
    with torch.no_grad():
        model.parametrizations.weight.original.zero_()  # type: ignore[union-attr, operator]
    assert kept_counts(model) == {"weight": 3}


GOOD = {"stage": "during", "trajectory": "sparse-to-sparse", "mask": "dynamic", "moves": ("drop", "grow")}


@pytest.mark.parametrize(
    "wrong",
    [
        {"stage": "whenever"},
        {"trajectory": "sparse"},
        {"mask": "moving"},
        {"pattern": "stripes"},
        {"scope": "biases"},
        {"budget": ()},
        {"budget": ("money",)},
        {"moves": ("jump",)},
        {"mask": "static"},  # with drop and grow
        {"moves": ()},
        {"moves": ("drop",)},  # the density would fall
        {"stage": "after"},
        {"stage": "before"},
        {"stage": "before", "trajectory": "dense-to-sparse"},
        {"trajectory": "dense-to-sparse", "moves": ("grow",)},
        {"stage": "during", "mask": "static", "moves": ()},
        {"stage": "after", "trajectory": "dense-to-sparse", "moves": ("drop",), "budget": ("train-flops",)},
        {"scope": "gradients", "budget": ("infer-flops",)},
    ],
)
def test_tags_that_contradict_each_other_are_refused(wrong: dict[str, Any]) -> None:
    SparsityTags(**GOOD)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="got"):
        SparsityTags(**{**GOOD, **wrong})


def test_tags_of_known_methods_are_accepted() -> None:
    SparsityTags(stage="before", trajectory="sparse-to-sparse", mask="static", budget=("train-flops", "memory"))
    SparsityTags(stage="during", trajectory="dense-to-sparse", mask="dynamic", moves=("drop",))
    SparsityTags(stage="after", trajectory="dense-to-sparse", mask="static", pattern="N:M")
    SparsityTags(**GOOD, scope="gradients", budget=("communication",))  # type: ignore[arg-type]


def _split() -> Split:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    return Split(x, torch.randint(0, 3, (40,), generator=generator))


def test_train_masked_repeats_itself_and_leaves_masks_on() -> None:
    found = []
    for _ in range(2):
        model = _model()
        objective = supervised(nn.functional.cross_entropy)
        seen: list[int] = []
        training = train_masked(
            model,
            _split(),
            objective,
            _masks(model),
            steps=12,
            batch_size=8,
            lr=0.01,
            seed=5,
            change=DropGrow(end=10, every=2, grow="random"),
            on_step=lambda step, loss, seen=seen: seen.append(step),  # type: ignore[misc]
        )
        torch.rand(1)  # nothing outside may matter
        found.append(torch.cat([w.detach().flatten() for w in scores.prunable(model).values()]))
        assert seen == list(range(1, 13))
        assert len(training.history) == 12
        assert not model.training
        assert (found[-1] != 0).sum() <= 36
    assert torch.equal(found[0], found[1])
    with pytest.raises(BadInput, match="steps >= 1"):
        train_masked(_model(), _split(), objective, {}, steps=0, batch_size=8, lr=0.1, seed=0)


def test_rewinding_goes_back_to_the_same_weights() -> None:
    model = _model()
    first = {n: w.detach().clone() for n, w in model.state_dict().items()}
    stops: list[int | None] = []

    def train_fn(net: nn.Module, stop: int | None) -> None:
        stops.append(stop)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(1.0)

    def prune(end: Any, start: Any, masks: Any) -> dict[str, Tensor]:
        assert all(torch.equal(end[n], torch.where(m, start[n] + 1.0, 0.0)) for n, m in masks.items())
        return {n: remove_lowest({n: w.abs()}, {n: masks[n]}, 2)[n] for n, w in end.items()}

    found = prune_and_rewind(model, train_fn, prune, 3, rewind_step=4)
    assert stops == [4, None, None, None]
    assert all(torch.equal(v, first[n]) for n, v in model.state_dict().items())
    assert [round(one.density * 72) for one in found.rounds] == [72, 68, 64]
    assert round(found.density * 72) == 60
    ticket = found.ticket()
    for name, weight in scores.prunable(ticket).items():
        assert torch.equal(weight, torch.where(found.masks[name], first[name] + 1.0, 0.0))
    assert torch.equal(ticket[0].bias, first["0.bias"] + 1.0)  # type: ignore[index]
    fresh, mixed = found.reinitialized(seed=1), found.shuffled(2, seed=1)
    assert kept_counts(fresh) == kept_counts(ticket)
    assert kept_counts(mixed) == {n: int(m.sum()) for n, m in found.masks_of(2).items()}
    assert not torch.equal(fresh[0].weight, ticket[0].weight)  # type: ignore[index]
    assert all((w != 0).sum() == found.masks[n].sum() for n, w in scores.prunable(fresh).items())
    for wrong in (0, -1):
        with pytest.raises(BadInput, match="rounds >= 1"):
            prune_and_rewind(model, train_fn, prune, wrong)
    with pytest.raises(BadInput, match="no prunable weight"):
        prune_and_rewind(nn.ReLU(), train_fn, prune, 1)
    with pytest.raises(BadInput, match="number must lie"):
        found.masks_of(4)


def test_a_tasks_trainer_stops_on_its_own_way() -> None:
    from torchgraft.bench.task import Task

    split = _split()
    task = Task(_model(), split, split, split, nn.functional.cross_entropy, lambda o, t: (o.argmax(1) == t).float())
    run = trainer(task, steps=6, lr=0.01, batch_size=8, seed=2)
    short, whole = _model(), _model()
    run(short, 4)
    trainer(task, steps=4, lr=0.01, batch_size=8, seed=2)(whole, None)
    assert all(torch.equal(a, b) for a, b in zip(short.parameters(), whole.parameters(), strict=True))
    run(whole, None)
    assert not torch.equal(short[0].weight, whole[0].weight)


def test_only_named_weights_are_rewound_under_masks() -> None:
    def prune(end: Any, start: Any, masks: Any) -> Any:
        assert list(end) == list(start) == list(masks) == ["2.weight"]
        return {name: mask & (end[name] > 0) for name, mask in masks.items()}

    model = _model()
    found = prune_and_rewind(model, lambda net, stop: None, prune, 2, names=["2.weight"])
    assert torch.equal(found.masks["2.weight"], model[2].weight > 0)
    ticket = found.ticket()
    assert type(ticket[0]) is nn.Linear  # type: ignore[index]
    assert type(ticket[2]) is not nn.Linear  # type: ignore[index]
    with pytest.raises(BadInput, match="no prunable weight"):
        prune_and_rewind(model, lambda net, stop: None, prune, 2, names=["9.weight"])
