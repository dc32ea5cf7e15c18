"""LD-Pruner: the score by hand, its invariances, and what is left after pruning."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from torchgraft.engines.surgery.edits import history
from torchgraft.errors import BadInput
from torchgraft.shrink.prune.ld_pruner import LDPruner, latent_scores, operators, score


class Block(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.fc, self.act, self.scale = nn.Linear(4, 4), nn.Tanh(), scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.act(self.fc(x))


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 4)
        self.blocks = nn.Sequential(Block(1.0), Block(0.0), Block(0.1))
        self.same = nn.Linear(4, 4)
        self.out = nn.Linear(4, 3)
        with torch.no_grad():
            self.same.weight.copy_(torch.eye(4))
            self.same.bias.zero_()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.out(self.same(self.blocks(self.inner(x) + t)))


def _sampler(model: nn.Module, n: int, draw: torch.Generator) -> Tensor:
    x = torch.randn(n, 3, generator=draw, dtype=torch.float64)
    for step in range(4):
        x = x - 0.3 * model(x, torch.full((n, 1), step / 4, dtype=torch.float64))
    return x


def _denoiser() -> nn.Module:
    torch.manual_seed(0)
    return Denoiser().double().eval()


def test_score_by_hand_and_of_one_sample() -> None:
    a = torch.tensor([[0.0, 0.0], [2.0, 4.0]])
    b = torch.tensor([[3.0, 0.0], [3.0, 0.0]])
    # means (1, 2) and (3, 0), deviations (1, 2) and (0, 0)
    assert score(a, b) == pytest.approx(8**0.5 + 5**0.5)
    assert score(a[:1], b[:1]) == pytest.approx(3.0)
    order = torch.tensor([1, 0])
    assert score(a[order], b) == score(a, b[order]) == score(a, b)


def test_operators_without_effect_score_exactly_zero_and_come_first() -> None:
    model = _denoiser()
    pruner = LDPruner(_sampler, model, n_latents=16)
    assert set(pruner.scores) == {
        *("blocks", "same"),
        *(f"blocks.{i}{part}" for i in range(3) for part in ("", ".fc", ".act")),
    }
    nothing = {"same", "blocks.1", "blocks.1.fc", "blocks.1.act"}
    assert {name for name, value in pruner.scores.items() if value == 0.0} == nothing
    assert pruner.scores["blocks.0"] > pruner.scores["blocks.2"] > 0
    assert torch.equal(_sampler(pruner.prune(4), 8, torch.Generator()), _sampler(model, 8, torch.Generator()))


def test_what_is_left_is_bit_for_bit_and_the_original_untouched() -> None:
    model = _denoiser()
    before = copy.deepcopy(model.state_dict())
    pruner = LDPruner(_sampler, model, n_latents=4)
    removed: set[str] = set()
    for k in range(len(pruner.scores) + 1):
        cut = pruner.prune(k)
        gone = {name for edit in history(cut) for name in edit.describe()}
        assert all(any(f"{old}.".startswith(f"{new}.") for new in gone) for old in removed)
        removed = gone
        for name, value in cut.state_dict().items():
            assert torch.equal(value, before[name])
        missing = before.keys() - cut.state_dict().keys()
        assert all(any(name.startswith(f"{each}.") for each in gone) for name in missing)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert isinstance(model.same, nn.Linear)


def test_decoder_is_not_asked_and_the_same_noise_is_used() -> None:
    asked: list[Tensor] = []

    def sampler(model: nn.Module, n: int, draw: torch.Generator) -> Tensor:
        asked.append(torch.randn(1, generator=draw.clone_state()))
        return _sampler(model, n, draw)

    LDPruner(sampler, _denoiser(), operators=["same", "blocks.0"], n_latents=4, seed=3)
    assert len(asked) == 3
    assert len({float(each) for each in asked}) == 1


def test_shapes_are_observed_and_ignored_parts_keep_what_holds_them() -> None:
    model = _denoiser()
    x, t = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)
    found = operators(model, lambda each: each(x, t), ignore=["blocks.1.fc"])
    assert "inner" not in found
    assert "out" not in found
    assert {"blocks", "blocks.1", "blocks.1.fc"}.isdisjoint(found)
    assert {"blocks.0", "blocks.1.act", "same"} <= set(found)
    scores = latent_scores(model, ["blocks.0"], lambda each: each(x + 1.0, t))
    assert scores["blocks.0"] > 0


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) * self.a.weight.mean()


def test_what_the_model_needs_or_what_breaks_it_is_never_removed() -> None:
    model = Reads()
    scores = latent_scores(model, ["a", "b"], lambda each: each(torch.ones(2, 3)))
    assert scores["a"] == float("inf") > scores["b"]
    pruner = LDPruner(lambda each, n, draw: each(torch.randn(n, 3, generator=draw)), model, n_latents=2)
    assert isinstance(pruner.prune(2).b, nn.Identity)
    assert isinstance(pruner.prune(2).a, nn.Linear)


def test_bad_input() -> None:
    model = _denoiser()
    with pytest.raises(BadInput, match="n_latents"):
        LDPruner(_sampler, model, n_latents=0)
    with pytest.raises(BadInput, match="nowhere"):
        LDPruner(_sampler, model, operators=["nowhere"])
    with pytest.raises(BadInput, match="k must lie"):
        LDPruner(_sampler, model, operators=["same"], n_latents=2).prune(2)
