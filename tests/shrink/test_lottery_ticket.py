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

from torchgraft.engines.masks import prunable
from torchgraft.errors import BadInput
from torchgraft.shrink.prune.lottery_ticket import lottery_ticket, one_shot, prune_smallest


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
