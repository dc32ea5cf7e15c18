"""Each check of elastic models can fail: a sound toy passes all, and for each there is a broken toy that it catches."""

from __future__ import annotations

import copy
import itertools
import time
import types
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from torchgraft.bench.task import Task
from torchgraft.catalogue import Card
from torchgraft.contracts import Subject, elastic
from torchgraft.contracts.run import run_check
from torchgraft.engines.nesting import ElasticModule, ElasticProcedure
from torchgraft.engines.procedure import Site, ignored
from torchgraft.engines.surgery.edits import Edit
from torchgraft.errors import BadInput

CARD = Card(
    key="toy-elastic",
    title="A toy",
    authors="Nobody, 2026",
    reference="https://example.org/toy",
    family="elastic",
    kind="procedure",
    equation="y = small(x) below the full budget",
    entry="Toy",
    capabilities=frozenset({"elastic"}),
    oracles=("none",),
    choose_when="never, it is a toy",
    choose_instead="anything else at all",
    bibtex="@misc{toy, title={A {T}oy}, author={Nobody}, year={2026}}",
)
CHECKS = {check.name: check for check in elastic.CHECKS}
#: Multiply-accumulates of the check model a sample: 16 x 32, three times 32 x 32, 32 x 4.
FULL = 16 * 32 + 3 * 32 * 32 + 32 * 4


class TwoNets(ElasticModule):
    """A linear layer at each smaller budget, beside the original."""

    scale = 1.0

    def __init__(self, original: nn.Module, hidden: Sequence[int], budgets: Sequence[float]) -> None:
        super().__init__(budgets)
        self.original = original
        self.small = nn.ModuleList(nn.Sequential(nn.Linear(16, h), nn.ReLU(), nn.Linear(h, 4)) for h in hidden)
        self.now = len(self.small)

    def select(self, level: int) -> None:
        self.now = level

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.original(x) if self.now == len(self.small) else self.small[self.now](x) * self.scale
        return out


class MakeTwo(Edit):
    """The edit that makes it."""

    __module__ = "torchgraft.elastic"  # an edit outside the package is refused; this one is registered already

    op: ClassVar[str] = "toy-two-nets"
    hidden: tuple[int, ...] = (40, 80)
    budgets: tuple[float, ...] = (40 * 20 / FULL, 80 * 20 / FULL, 1.0)

    def rewrite(self, model: nn.Module) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return TwoNets(model, self.hidden, self.budgets).train(model.training)

    def describe(self) -> dict[str, str]:
        return {"": "smaller networks beside it"}


class Toy(ElasticProcedure):
    """The sound toy."""

    card = CARD
    edit: ClassVar[type[Edit]] = MakeTwo

    def applies_to(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Site]:
        first = getattr(model, "inputs", None)
        fits = isinstance(first, nn.Linear) and first.in_features == 16
        return [Site("head", "linear", 1)] if fits and not ignored("head", ignore) else []

    def plan(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = (), seed: int = 0) -> list[Edit]:
        return [self.edit()]

    def train(
        self, elastic: ElasticModule, task: Task, *, steps: int, seed: int = 0, deadline: float | None = None
    ) -> int:
        if steps < 0:
            raise BadInput(f"steps must be at least 0, got {steps}")
        if deadline is not None and time.monotonic() >= deadline:
            return 0
        small: Any = elastic.small
        with torch.enable_grad():
            for _ in range(steps):
                loss = sum(task.loss(net(task.train.inputs), task.train.target) for net in small)
                weights = list(small.parameters())
                for weight, grad in zip(weights, torch.autograd.grad(loss, weights), strict=True):  # type: ignore[arg-type]
                    weight.data.sub_(0.1 * grad)
        return steps


def _made(edit: type[Edit]) -> type[Toy]:
    return type("Broken", (Toy,), {"edit": edit})


class _OneBudget(MakeTwo):
    op: ClassVar[str] = "toy-one-budget"
    hidden: tuple[int, ...] = ()
    budgets: tuple[float, ...] = (1.0,)


class _WrongCost(MakeTwo):
    op: ClassVar[str] = "toy-wrong-cost"
    budgets: tuple[float, ...] = (0.1, 0.8, 1.0)


def _variant(name: str, **members: Any) -> type[Edit]:
    kind = type(f"_{name}", (TwoNets,), members)

    def rewrite(self: MakeTwo, model: nn.Module) -> nn.Module:
        made = MakeTwo.rewrite(self, model)
        made.__class__ = kind
        return made

    return type(
        f"_Make{name}", (MakeTwo,), {"op": f"toy-{name}", "rewrite": rewrite, "__annotations__": {"op": ClassVar[str]}}
    )


def _batch_mean(self: TwoNets, x: Tensor) -> Tensor:
    out = TwoNets.forward(self, x)
    return out if self.now == len(self.small) else out + out.mean(0)


def _says_the_same(self: TwoNets, x: Tensor) -> Tensor:
    out: Tensor = self.original(x)
    return out


def _copies(self: TwoNets, level: int) -> None:
    self.now = level
    for value in self.small.parameters():
        value.data = value.data.clone()


def _takes_any(self: TwoNets, budget: float) -> TwoNets:
    self.select(0)
    self.level = 0
    return self


class _MovesFull(Toy):
    def train(self, elastic: ElasticModule, task: Task, **options: Any) -> int:
        steps = super().train(elastic, task, **options)
        if steps:
            next(elastic.parameters()).data.add_(0.1)
            next(elastic.original.parameters()).data.add_(0.1)  # type: ignore[union-attr]
        return steps


class _Settles(Toy):
    def build(self, model: nn.Module, task: Task, **options: Any) -> ElasticModule:
        return super().build(model.eval(), task, **options)


class _Idle(Toy):
    def train(self, elastic: ElasticModule, task: Task, **options: Any) -> int:
        return 0


class _Late(Toy):
    def train(self, elastic: ElasticModule, task: Task, *, steps: int, **options: Any) -> int:
        return super().train(elastic, task, steps=min(steps, 5))


class _Peeks(Toy):
    def initialise(self, elastic: ElasticModule, task: Task, *, seed: int = 0) -> None:
        assert len(task.val) > 0


class _Forgets(Toy):
    def initialise(self, elastic: ElasticModule, task: Task, *, seed: int = 0) -> None:
        elastic.scale = 2.0


class _Deaf(Toy):
    def applies_to(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Site]:
        return super().applies_to(model, task)


class _Eager(Toy):
    def applies_to(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Site]:
        return super().applies_to(model, task, ignore=ignore) or [Site("head", "linear", 1)]


BROKEN: dict[str, type[Toy]] = {
    "budgets-rise-to-one": _made(_OneBudget),
    "full-budget-equals-the-original": _MovesFull,
    "smaller-budgets-differ": _made(_variant("same", forward=_says_the_same)),
    "costs-are-what-they-say": _made(_WrongCost),
    "a-sample-alone-equals-it-in-a-batch": _made(_variant("mean", forward=_batch_mean)),
    "switching-is-quick-and-copies-nothing": _made(_variant("copies", select=_copies)),
    "bad-budgets-are-refused": _made(_variant("any", set_budget=_takes_any)),
    "elastic-original-is-untouched": _Settles,
    "elastic-training-reaches-the-smaller-budgets": _Idle,
    "elastic-without-training-trains-nothing": Toy,
    "elastic-training-ends-in-time": _Late,
    "elastic-sees-training-samples-only": _Peeks,
    "elastic-reload-gives-the-same-outputs": _Forgets,
    "elastic-copy-is-independent": _made(_variant("shared", __deepcopy__=lambda self, memo: self)),
    "elastic-ignored-modules-stay": _Deaf,
    "elastic-model-without-sites-is-refused": _Eager,
}
#: Toys that are sound for a check of which the one that trains is not.
SOUND: dict[str, type[Toy]] = {"elastic-without-training-trains-nothing": _Idle}


def _subject(entry: type[Toy]) -> Subject:
    return Subject(card=CARD, entry=entry, module=types.ModuleType("toy"))


@pytest.mark.parametrize("name", CHECKS)
def test_the_sound_toy_passes(name: str) -> None:
    result = run_check(CHECKS[name], _subject(SOUND.get(name, Toy)))
    assert result.outcome == "passed", result.reason


@pytest.mark.parametrize("name", CHECKS)
def test_the_broken_toy_is_caught(name: str) -> None:
    result = run_check(CHECKS[name], _subject(BROKEN[name]))
    assert result.outcome == "failed"


def test_every_check_has_its_broken_toy() -> None:
    assert set(BROKEN) == set(CHECKS)


@pytest.mark.parametrize(
    "budgets", [(), (0.5,), (0.5, 0.5, 1.0), (0.9, 0.5, 1.0), (0.0, 1.0), (0.5, 1.5), (float("nan"), 1.0)]
)
def test_budgets_that_make_no_sense_are_refused(budgets: tuple[float, ...]) -> None:
    with pytest.raises(BadInput, match="budgets must rise"):
        TwoNets(nn.Linear(16, 4), (1,) * max(len(budgets) - 1, 0), budgets)


def test_a_budget_between_two_takes_the_lower_and_calibration_is_saved() -> None:
    made = TwoNets(nn.Linear(16, 4), (1, 2), (0.2, 0.5, 1.0))
    assert [made.set_budget(b).budget for b in (0.2, 0.49, 0.5, 0.99, 1.0)] == [0.2, 0.2, 0.5, 0.5, 1.0]
    made.calibrate((0.3, 0.6, 1.0))
    twin = TwoNets(nn.Linear(16, 4), (1, 2), (0.2, 0.5, 1.0))
    twin.load_state_dict(made.state_dict())
    assert twin.budgets == (0.3, 0.6, 1.0)
    with pytest.raises(BadInput, match="there are 3 budgets"):
        made.calibrate((0.5, 1.0))
    assert all(a < b for a, b in itertools.pairwise(copy.deepcopy(made).budgets))
