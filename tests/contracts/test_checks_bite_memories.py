"""Each check of memories can fail: two sound toys pass all, and for each there is a broken toy that it catches."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchgraft.catalogue import Card
from torchgraft.contracts import Check, Subject, memories
from torchgraft.contracts.run import run_check
from torchgraft.parts.memories import discrete_key_value_bottleneck, modern_hopfield

FACTS: dict[str, Any] = {
    "key": "toy-memory",
    "title": "A toy",
    "authors": "Nobody, 2026",
    "reference": "https://example.org/toy",
    "family": "parts/memories",
    "kind": "part",
    "equation": "y = softmax(x x^T) x",
    "entry": "Recall",
    "oracles": ("none",),
    "choose_when": "never, it is a toy",
    "choose_instead": "anything else at all",
    "bibtex": "@misc{toy, title={A {T}oy}, author={Nobody}, year={2026}}",
}
SET = Card(
    **FACTS,
    example={"d_model": 8},
    shapes=((2, 12, 8),),
    capabilities=frozenset({"permutation-equivariant", "padding-mask"}),
)
TABLE = Card(**FACTS, example={"d_model": 8}, shapes=((32, 8),))


class Recall(nn.Module):
    """Each token reads a mixture of all."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((d_model,), 0.3))

    def weights(self, x: Tensor, mask: Tensor | None) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        unit = nn.functional.normalize(x.to(wide), dim=-1)
        scores = (unit * self.scale.to(wide)) @ unit.mT
        if mask is None:
            return scores.softmax(-1)
        return scores.masked_fill(~mask[:, None], -1e30).softmax(-1).masked_fill(~mask[:, None], 0)

    def retrieved(self, x: Tensor, *, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        weights = self.weights(x, mask)
        return (weights @ x.to(weights.dtype))[:, None], x[:, None]

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return self.retrieved(x, mask=mask)[0][:, 0].to(x.dtype)


class Table(nn.Module):
    """The value of the nearest of sixteen keys, in each of two books."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.register_buffer("keys", torch.randn(2, 16, d_model))
        self.values = nn.Parameter(torch.randn(2, 16, 3))

    def fetch(self, x: Tensor) -> Tensor:
        return torch.cdist(x.detach().float().expand(2, -1, -1), self.keys.float()).argmin(-1)

    def forward(self, x: Tensor) -> Tensor:
        indices = self.fetch(x)
        return (self.values[0, indices[0]] + self.values[1, indices[1]] + 0 * x[:, :3]).to(x.dtype)


# --- broken ones


class SeesTheBatch(Recall):
    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask=mask) + 1e-6 * x.mean((0, 1))


class CentresTheBatch(Table):
    def fetch(self, x: Tensor) -> Tensor:
        return super().fetch(x - x.mean(0))


class LearnsWhenRead(Table):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        with torch.no_grad():
            self.keys += 1e-3 * torch.randn_like(self.keys)
        return out


class KeepsTheLast(Recall):
    """What it was asked before is in no weight, yet it answers by it."""

    last = 0.0

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        out = super().forward(x, mask=mask) + self.last
        self.last = float(x.detach().mean())
        return out


class DividesBySpread(Recall):
    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask=mask) / x.std(1, keepdim=True)


class PlainExponential(Recall):
    def weights(self, x: Tensor, mask: Tensor | None) -> Tensor:
        exponentials = torch.exp(x @ x.mT)
        exponentials = exponentials if mask is None else exponentials * mask[:, None]
        return exponentials / exponentials.sum(-1, keepdim=True)


class FiniteForwardOnly(Recall):
    """The square root of a zero has an infinite derivative."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        spread = (x - x.mean(1, keepdim=True)).square().mean(1, keepdim=True)
        return super().forward(x, mask=mask) + spread.sqrt()


class KnowsPlaces(Recall):
    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return super().forward(x + 1e-6 * torch.arange(x.shape[1])[:, None], mask=mask)


class SumsInHalf(Recall):
    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        total = torch.zeros_like(x[:, 0])
        for token in x.unbind(1):
            total = total + token
        return super().forward(x, mask=mask) + total[:, None] / x.shape[1]


class IgnoresTheMask(Recall):
    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return super().forward(x)


class MasksSoftly(Recall):
    def weights(self, x: Tensor, mask: Tensor | None) -> Tensor:
        weights = super().weights(x, None)
        return weights if mask is None else weights * (mask[:, None] + 1e-6)


class BreaksOnNothing(Recall):
    def weights(self, x: Tensor, mask: Tensor | None) -> Tensor:
        weights = super().weights(x, mask)
        return weights / weights.sum(-1, keepdim=True)


class MasksEverything(Recall):
    """Never reads the others, mask or not."""

    def weights(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return torch.eye(x.shape[1], dtype=x.dtype).expand(len(x), -1, -1)


class ReadsTooMuch(Recall):
    def weights(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return 1.2 * super().weights(x, mask)


class Subtracts(Recall):
    """Weights of sum one, some of them negative."""

    def weights(self, x: Tensor, mask: Tensor | None) -> Tensor:
        weights = super().weights(x, mask)
        return 3 * torch.eye(x.shape[1], dtype=x.dtype) - 2 * weights


class NothingOfOne(Recall):
    def retrieved(self, x: Tensor, *, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        read, stored = super().retrieved(x, mask=mask)
        return (read if x.shape[1] > 1 else 0 * read), stored


class Nameless(nn.Module):
    """Has neither of the methods."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(d_model))


class ReadsTheMean(Table):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1e-7 * self.values.mean((0, 1))


class ReadsTheMeanWithoutGradient(Table):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.values.detach().mean((0, 1))


class TrainsNothing(Table):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach() + 0 * self.values.sum()


class HasFewValues(Table):
    def __init__(self, d_model: int) -> None:
        super().__init__(d_model)
        self.values = nn.Parameter(torch.randn(2, 1, 3))
        self.keys = self.keys[:, :1]


#: check name -> the toys that it must catch.
BROKEN: dict[str, tuple[type[nn.Module], ...]] = {
    "each-row-reads-alone": (SeesTheBatch, CentresTheBatch),
    "reading-leaves-the-memory": (LearnsWhenRead, KeepsTheLast),
    "memory-stays-finite": (DividesBySpread, PlainExponential, FiniteForwardOnly),
    "order-of-patterns-does-not-matter": (KnowsPlaces,),
    "many-patterns-keep-their-sum": (SumsInHalf,),
    "what-is-masked-is-not-read": (IgnoresTheMask, MasksSoftly, BreaksOnNothing, MasksEverything),
    "retrieved-is-a-mixture-of-the-stored": (ReadsTooMuch, Subtracts, NothingOfOne, Nameless),
    "only-what-was-fetched-learns": (
        ReadsTheMean,
        ReadsTheMeanWithoutGradient,
        TrainsNothing,
        HasFewValues,
        Nameless,
    ),
}
CHECKS: dict[str, Check] = {check.name: check for check in memories.CHECKS}
_OF_TABLES = (
    "each-row-reads-alone",
    "reading-leaves-the-memory",
    "memory-stays-finite",
    "only-what-was-fetched-learns",
)


def subject(toy: type[nn.Module]) -> Subject:
    """Return ``toy`` as something that can be checked."""
    return Subject(card=TABLE if issubclass(toy, Table) else SET, entry=toy, module=types.ModuleType("toy"))


@pytest.mark.parametrize("name", [name for name in CHECKS if name != "only-what-was-fetched-learns"])
def test_sound_set_passes(name: str) -> None:
    result = run_check(CHECKS[name], subject(Recall))
    assert result.outcome == "passed", result.reason


@pytest.mark.parametrize("name", _OF_TABLES)
def test_sound_table_passes(name: str) -> None:
    result = run_check(CHECKS[name], subject(Table))
    assert result.outcome == "passed", result.reason


@pytest.mark.parametrize(("name", "toy"), [(name, toy) for name, toys in BROKEN.items() for toy in toys])
def test_broken_memory_is_caught(name: str, toy: type[nn.Module]) -> None:
    result = run_check(CHECKS[name], subject(toy))
    assert result.outcome == "failed"
    assert "(at " not in result.reason, f"the toy crashed instead of failing the check: {result.reason}"


def test_every_check_of_memories_has_a_toy_that_it_catches() -> None:
    assert set(BROKEN) == set(CHECKS)


def test_checks_follow_from_the_card_and_the_entry() -> None:
    def names(card: Card) -> set[str]:
        return {name for name, check in CHECKS.items() if check.applies(card)}

    always = {"each-row-reads-alone", "reading-leaves-the-memory", "memory-stays-finite"}
    sets = {"order-of-patterns-does-not-matter", "many-patterns-keep-their-sum", "what-is-masked-is-not-read"}
    assert names(modern_hopfield.CARD) == always | sets | {"retrieved-is-a-mixture-of-the-stored"}
    assert names(discrete_key_value_bottleneck.CARD) == always | {"only-what-was-fetched-learns"}
    plain = modern_hopfield.CARD.model_copy(update={"capabilities": frozenset()})
    assert names(plain) == always | {"retrieved-is-a-mixture-of-the-stored"}
    assert not names(modern_hopfield.CARD.model_copy(update={"kind": "analysis"}))
    assert not names(modern_hopfield.CARD.model_copy(update={"family": "parts/norms"}))
