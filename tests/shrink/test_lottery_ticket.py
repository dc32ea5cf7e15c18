"""Lottery tickets: the integer recursion, nesting, rewinding bit for bit, zeros that stay zero, and the controls."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torchgraft.bench.task import Task
from torchgraft.engines.masks import prunable
from torchgraft.engines.sparse import SparseLinear
from torchgraft.engines.surgery.edits import history
from torchgraft.errors import BadInput
from torchgraft.shrink.prune import lottery_ticket as module
from torchgraft.shrink.prune.fast_sparse_conv import FastSparseConv
from torchgraft.shrink.prune.lottery_ticket import (
    LotteryTicket,
    lottery_ticket,
    one_shot,
    prune_blocks,
    prune_smallest,
    ticket_counts,
)


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 11), nn.BatchNorm1d(11), nn.ReLU(), nn.Linear(11, 7), nn.ReLU(), nn.Linear(7, 4))


def _train(seen: list[Any] | None = None, optimizer: str = "sgd") -> Any:
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(64, 9, generator=generator), torch.randint(0, 4, (64,), generator=generator)

    def run(model: nn.Module, stop: int | None) -> None:
        made = (
            torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
            if optimizer == "sgd"
            else torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
        )
        start = {name: weight.detach().clone() for name, weight in prunable(model).items()}
        model.train()
        for _ in range(6 if stop is None else stop):
            made.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            made.step()
            if seen is not None and stop is None:
                zero = {name: weight.detach() == 0 for name, weight in prunable(model).items()}
                seen.append((start, zero))

    return run


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_counts_follow_the_recursion_and_hidden_weights_stay_zero(optimizer: str) -> None:
    model, seen = _model(), []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = lottery_ticket(model, _train(seen, optimizer), 4, rate=0.3)
    counts = {"0.weight": 99, "3.weight": 77, "5.weight": 28}
    masks = [*(one.masks for one in found.rounds), found.masks]
    for number, mask in enumerate(masks):
        assert {name: int(each.sum()) for name, each in mask.items()} == counts, number
        rates = {"0.weight": Fraction(3, 10), "3.weight": Fraction(3, 10), "5.weight": Fraction(3, 20)}
        counts = {name: kept - int(rates[name] * kept) for name, kept in counts.items()}
    for outer, inner in itertools.pairwise(masks):
        assert all((outer[name] | ~inner[name]).all() for name in inner)
        assert any(not torch.equal(outer[name], inner[name]) for name in inner)
    for number, one in enumerate(found.rounds):
        start, _ = seen[6 * number]
        for name, mask in one.masks.items():
            assert torch.equal(start[name], torch.where(mask, before[name], 0.0))
            trained = prunable(one.trained)[name].detach()
            assert (trained[mask] != before[name][mask]).any()
        for _, zero in seen[6 * number : 6 * number + 6]:
            assert all(torch.equal(zero[name], ~mask) for name, mask in one.masks.items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(found.ticket()[1].running_mean, before["1.running_mean"])  # type: ignore[index]


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_what_goes_is_smaller_than_what_stays_in_its_scope(scope: Any) -> None:
    found = lottery_ticket(_model(), _train(), 3, scope=scope)
    after = [*(one.masks for one in found.rounds[1:]), found.masks]
    for one, masks in zip(found.rounds, after, strict=True):
        end = {name: weight.detach().abs() for name, weight in prunable(one.trained).items()}
        groups = [["0.weight"], ["3.weight"], ["5.weight"]] if scope == "layer" else [["0.weight", "3.weight"]]
        for group in groups:
            gone = torch.cat([end[name][one.masks[name] & ~masks[name]] for name in group])
            stay = torch.cat([end[name][masks[name]] for name in group])
            assert len(gone) > 0
            assert gone.max() <= stay.min()
    whole = {name: int(mask.sum()) for name, mask in found.masks.items()}
    layered = lottery_ticket(_model(), _train(), 3)
    by_layer = {name: int(mask.sum()) for name, mask in layered.masks.items()}
    assert whole["5.weight"] == by_layer["5.weight"]  # the output layer has its own rate either way
    assert (whole == by_layer) == (scope == "layer")


def test_all_layers_together_with_the_output() -> None:
    weights = {"a": torch.tensor([4.0, 1.0, -2.0]), "b": torch.tensor([0.5, 3.0])}
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    found = prune_smallest(weights, masks, rate=0.6, scope="global", output_rate_scale=None)
    assert {name: mask.tolist() for name, mask in found.items()} == {"a": [True, False, False], "b": [False, True]}
    by_name = prune_smallest(weights, masks, rate=0.5, output="a", output_rate_scale=0.0)
    assert {name: mask.tolist() for name, mask in by_name.items()} == {"a": [True] * 3, "b": [False, True]}


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    rate=st.sampled_from([0.0, 0.1, 0.2, 0.29, 0.5, 0.7]),
    rounds=st.integers(1, 5),
    seed=st.integers(0, 999),
)
def test_one_shot_has_the_counts_of_all_rounds(sizes: list[int], rate: float, rounds: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = {str(n): torch.randn(size, generator=generator) for n, size in enumerate(sizes)}
    masks: dict[str, Tensor] = {n: torch.ones_like(w, dtype=torch.bool) for n, w in weights.items()}
    exact = Fraction(str(rate))
    for n, size in enumerate(sizes):
        kept = size
        for _ in range(rounds):
            kept -= int((exact / 2 if n == len(sizes) - 1 else exact) * kept)
        found = one_shot(weights, masks, rounds, rate=rate)[str(n)]
        assert int(found.sum()) == kept
        assert torch.equal(found, weights[str(n)].abs() >= weights[str(n)].abs().sort(descending=True)[0][kept - 1])


def test_rewinding_to_a_later_step() -> None:
    model = _model()
    later = _model()
    _train()(later, 2)
    found = lottery_ticket(model, _train(), 1, rewind_step=2)
    for name, weight in prunable(found.ticket()).items():
        assert torch.equal(weight, torch.where(found.masks[name], prunable(later)[name], 0.0))
    assert not torch.equal(prunable(later)["0.weight"], prunable(model)["0.weight"])


def test_controls_keep_the_counts_and_nothing_else() -> None:
    found = lottery_ticket(_model(), _train(), 2)
    ticket, fresh, mixed = (prunable(m) for m in (found.ticket(), found.reinitialized(seed=4), found.shuffled(seed=4)))
    for name, mask in found.masks.items():
        assert torch.equal(fresh[name] != 0, mask)
        assert not (fresh[name] == ticket[name])[mask].any()
        assert int((mixed[name] != 0).sum()) == int(mask.sum())
        assert not torch.equal(mixed[name] != 0, mask)
    again = prunable(found.reinitialized(seed=4))
    assert all(torch.equal(again[name], fresh[name]) for name in fresh)


def test_bad_settings_are_refused_before_any_training() -> None:
    def never(model: nn.Module, stop: int | None) -> None:
        raise AssertionError("trained")

    for wrong, words in (
        ({"rate": 1.0}, "rates must lie"),
        ({"rate": -0.1}, "rates must lie"),
        ({"rate": 0.6, "output_rate_scale": 2.0}, "rates must lie"),
        ({"scope": "channel"}, "scope must be"),
        ({"output": "9.weight"}, "no prunable weight '9.weight'"),
    ):
        with pytest.raises(BadInput, match=words):
            lottery_ticket(_model(), never, 2, **wrong)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="rounds >= 1"):
        lottery_ticket(_model(), never, 0)
    with pytest.raises(BadInput, match="no prunable weight"):
        lottery_ticket(nn.ReLU(), never, 1)


class _Tokens(nn.Module):
    """An embedding, two hidden layers with a norm between them, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.norm = nn.Linear(5, 16), nn.Linear(16, 24), nn.BatchNorm1d(24)
        self.second, self.head = nn.Linear(24, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.first(self.embed(x).relu())).relu()
        out: Tensor = self.head(self.second(hidden).relu())
        return out


def _task() -> Task:
    torch.manual_seed(0)
    model = _Tokens().double().eval()
    x, y = torch.randn(24, 5, dtype=torch.float64), torch.randint(0, 4, (24,))
    score = lambda out, target: (out.argmax(1) == target).float()  # noqa: E731
    return Task(model, (x, y), (x, y), (x, y), nn.functional.cross_entropy, score, batch_size=8, learning_rate=0.02)


def _dense(layer: nn.Module) -> Tensor:
    assert isinstance(layer, SparseLinear)
    return layer.weight.detach()


def test_counts_of_rounds_fall_by_one_share_and_end_where_asked() -> None:
    assert ticket_counts(100, 10, 2) == [32, 10]
    assert ticket_counts(1024, 51, 1) == [51]
    for size, kept in ((7, 7), (384, 19), (384, 1)):
        counts = ticket_counts(size, kept, 4)
        assert counts[-1] == kept
        assert all(later <= sooner for sooner, later in itertools.pairwise([size, *counts]))


def test_blocks_by_hand() -> None:
    weight = torch.tensor([[5.0, 1.0, 0.0], [-4.0, 1.0, 2.0], [3.0, 9.0, 1.0], [3.0, 9.0, 0.0]], dtype=torch.float64)
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[2:, 1] = False  # the largest block has gone, and stays away
    found = prune_blocks(weight, mask, 2, rows=2)
    assert found.tolist() == [[True, False, False]] * 2 + [[True, False, False]] * 2
    single = prune_blocks(weight, mask, 3)
    assert single.nonzero().tolist() == [[0, 0], [1, 0], [2, 0]]  # of two equal ones the earlier stays


@pytest.mark.parametrize("block", [1, 4])
def test_without_training_the_ticket_is_one_stroke_of_magnitude(block: int) -> None:
    task = _task()
    model = task.trained()
    made = LotteryTicket(steps=0, rounds=3, timed=False, most=0.9, block=block).apply(model, task, 0.7)
    plain = FastSparseConv(block=block, most=0.9, timed=False).apply(model, task, 0.7)
    assert history(made) == history(plain)
    assert made.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in made.state_dict().items())


def test_every_round_goes_back_to_the_weights_as_given(monkeypatch: pytest.MonkeyPatch) -> None:
    task = _task()
    model = task.trained()
    given = {name: value.clone() for name, value in model.state_dict().items()}
    draw = torch.Generator().manual_seed(1)
    ends = [torch.randn(24, 16, generator=draw, dtype=torch.float64) for _ in range(4)]
    seen: list[dict[str, Tensor]] = []

    def fake(net: Any, task: Task, **settings: Any) -> None:
        seen.append({name: weight.detach().clone() for name, weight in prunable(net).items()})
        assert torch.equal(net.norm.running_mean, given["norm.running_mean"])
        with torch.no_grad():
            net.first.parametrizations.weight.original.copy_(ends[len(seen) - 1])
            net.norm.running_mean.add_(1.0)
            net.head.bias.add_(0.5)

    monkeypatch.setattr(module, "finetune", fake)
    made: Any = LotteryTicket(rounds=3, timed=False, most=0.9).apply(model, task, 1.0)
    counts = [384, *ticket_counts(384, 38, 3)]
    mask = torch.ones(24, 16, dtype=torch.bool)
    for number, start in enumerate(seen):
        assert int(mask.sum()) == counts[number]
        assert torch.equal(start["first.weight"], torch.where(mask, given["first.weight"], 0.0))
        for name in ("embed.weight", "head.weight"):
            assert torch.equal(start[name], given[name])
        if number < 3:  # by hand: the largest of those left, on the weights after the round
            scores = ends[number].abs().masked_fill(~mask, -1.0).flatten()
            mask = torch.zeros(384, dtype=torch.bool)
            mask[scores.argsort(descending=True)[: counts[number + 1]]] = True
            mask = mask.view(24, 16)
    assert len(seen) == 4
    assert torch.equal(_dense(made.first), torch.where(mask, ends[3], 0.0))  # the ticket, trained
    assert torch.equal(made.head.bias, given["head.bias"] + 0.5)
    assert torch.equal(made.norm.running_mean, given["norm.running_mean"] + 1.0)
    assert all(torch.equal(value, given[name]) for name, value in model.state_dict().items())


def test_training_moves_what_is_left_and_nothing_that_is_ignored() -> None:
    task = _task()
    model = task.trained().train()
    model.embed.weight.requires_grad_(False)
    made: Any = LotteryTicket(rounds=2, steps=3, timed=False).apply(model, task, 1.0, ignore=["norm", "second"])
    plain: Any = LotteryTicket(rounds=2, steps=0, timed=False).apply(model, task, 1.0, ignore=["norm", "second"])
    assert int((_dense(made.first) != 0).sum()) == made.first.kept == 19
    assert not torch.equal(_dense(made.first), _dense(plain.first))
    assert type(made.second) is nn.Linear
    before, after = model.state_dict(), made.state_dict()
    for name in ("norm.weight", "norm.running_mean", "norm.num_batches_tracked", "second.weight", "embed.weight"):
        assert torch.equal(before[name], after[name]), name
    assert not torch.equal(before["head.weight"], after["head.weight"])
    assert all(one.training for one in made.modules())
    assert made.norm.weight.requires_grad
    assert not made.embed.weight.requires_grad


def test_where_nothing_pays_nothing_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr(module, "finetune", never)
    task = _task()
    made = LotteryTicket(timed=False).apply(task.trained(), task, 0.02)
    assert history(made) == ()
    assert all(torch.equal(value, task.trained().state_dict()[name]) for name, value in made.state_dict().items())


def test_settings_of_the_lever_are_refused() -> None:
    for wrong in ({"rounds": 0}, {"steps": -1}, {"most": 1.0}, {"block": 3}):
        with pytest.raises(BadInput):
            LotteryTicket(**wrong)  # type: ignore[arg-type]
    assert LotteryTicket(rounds=5, steps=7, lr=0.1, block=2).for_costs(("size",)).__dict__ == {
        **LotteryTicket(rounds=5, steps=7, lr=0.1, block=2).__dict__,
        "timed": False,
    }
