"""Each check can fail: sound toys pass all of them, and for each there is a broken toy that it catches."""

from __future__ import annotations

import copy
import itertools
import time
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from torchgraft.bench.task import Task
from torchgraft.catalogue import Card
from torchgraft.contracts import CHECKS, Subject, attention, checks_for, elastic, memories, mixers, modules, norms
from torchgraft.contracts.run import run_check
from torchgraft.engines.procedure import Procedure, Site, ignored
from torchgraft.engines.surgery.edits import Edit, apply_edits, history
from torchgraft.engines.surgery.slicing import Slice, Structure, structure
from torchgraft.errors import BadInput, Untraceable

FACTS: dict[str, Any] = {
    "key": "toy",
    "title": "A toy",
    "authors": "Nobody, 2026",
    "reference": "https://example.org/toy",
    "family": "shrink/factorize",
    "equation": "W = U V",
    "entry": "Sound",
    "oracles": ("none",),
    "choose_when": "never, it is a toy",
    "choose_instead": "anything else at all",
    "bibtex": "@misc{toy, title={A {T}oy}, author={Nobody}, year={2026}}",
}
CARD = Card(kind="procedure", stage="rank", **FACTS)
RECOVERY = Card(kind="procedure", **{**FACTS, "key": "toy-recovery", "entry": "follow"})


class Split(Edit):
    """Replace a linear layer by two of a lower rank."""

    __module__ = "torchgraft.toy"  # edits are read back from torchgraft's own modules only
    op: ClassVar[str] = "toy-split"
    ranks: dict[str, int]

    def rewrite(self, model: nn.Module) -> nn.Module:
        for name, rank in self.ranks.items():
            parent, _, child = name.rpartition(".")
            old = model.get_submodule(name)
            assert isinstance(old, nn.Linear)
            u, s, v = torch.linalg.svd(old.weight.detach(), full_matrices=False)
            first, second = nn.Linear(old.in_features, rank, bias=False), nn.Linear(rank, old.out_features)
            with torch.no_grad():
                first.weight.copy_(v[:rank])
                second.weight.copy_(u[:, :rank] * s[:rank])
                second.bias.copy_(old.bias)
            new = nn.Sequential(first, second).train(old.training)
            setattr(model.get_submodule(parent), child, new)
        return model

    def describe(self) -> dict[str, str]:
        return {name: f"rank {rank}" for name, rank in self.ranks.items()}


class Sound(Procedure):
    """Low rank for the hidden layers of the MLP.

    Args:
        share: share of the rank that stays at strength 0.
    """

    card = CARD

    def __init__(self, *, share: float = 0.5) -> None:
        self.share = share

    def applies_to(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Site]:
        return [
            Site(name, "linear", 32, 1056)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and ".0" in name and not ignored(name, ignore)
        ]

    def rank(self, strength: float) -> int:
        return max(1, round(30 * self.share * (1 - strength)))

    def plan(
        self, model: nn.Module, task: Task, strength: float, *, ignore: Sequence[str] = (), seed: int = 0
    ) -> list[Edit]:
        return [Split(ranks={site.name: self.rank(strength) for site in self.applies_to(model, task, ignore=ignore)})]


class _After(Sound):
    """A toy that does one more thing to the changed model."""

    def after(self, model: nn.Module, original: nn.Module, task: Task, strength: float) -> nn.Module:
        raise NotImplementedError

    def apply(
        self, model: nn.Module, task: Task, strength: float, *, ignore: Sequence[str] = (), seed: int = 0
    ) -> nn.Module:
        changed = super().apply(model, task, strength, ignore=ignore, seed=seed)
        with torch.no_grad():
            return self.after(changed, model, task, strength)


class OtherCard(Sound):
    card = Card(kind="procedure", stage="rank", **{**FACTS, "key": "another-toy"})


class MovesAtZero(_After):
    def after(self, model: nn.Module, original: nn.Module, task: Task, strength: float) -> nn.Module:
        if strength == 0:
            next(model.parameters()).mul_(1.0 + 1e-6)
        return model


class DoesNothing(Sound):
    def plan(self, *args: Any, **options: Any) -> list[Edit]:
        return []


class TurnsOriginalToEval(_After):
    def after(self, model: nn.Module, original: nn.Module, task: Task, strength: float) -> nn.Module:
        original.eval()
        return model


class MovesOriginal(_After):
    def after(self, model: nn.Module, original: nn.Module, task: Task, strength: float) -> nn.Module:
        next(original.parameters()).add_(1.0)
        return model


class LeavesHook(_After):
    def after(self, model: nn.Module, original: nn.Module, task: Task, strength: float) -> nn.Module:
        original.register_forward_hook(lambda *_: None)
        return model


class DrawsGlobally(_After):
    def after(self, model: nn.Module, original: nn.Module, task: Task, strength: float) -> nn.Module:
        torch.rand(1)
        return model


class UsesGlobalRandomness(_After):
    def after(self, model: nn.Module, original: nn.Module, task: Task, strength: float) -> nn.Module:
        if strength > 0:
            next(model.parameters()).add_(torch.rand(1))
        return model


class CostsMore(Sound):
    def rank(self, strength: float) -> int:
        return 5 + round(20 * strength)


class IgnoresIgnore(Sound):
    def plan(
        self, model: nn.Module, task: Task, strength: float, *, ignore: Sequence[str] = (), seed: int = 0
    ) -> list[Edit]:
        return super().plan(model, task, strength, seed=seed)


class _Scaled(nn.Module):
    def __init__(self, inner: nn.Module, gain: float) -> None:
        super().__init__()
        self.inner, self.gain = inner, gain

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.gain


class _Scale(Edit):
    """Scale the first parameter."""

    __module__ = "torchgraft.toy"
    op: ClassVar[str] = "toy-scale"
    gain: float

    def rewrite(self, model: nn.Module) -> nn.Module:
        with torch.no_grad():
            next(model.parameters()).mul_(self.gain)
        return model

    def describe(self) -> dict[str, str]:
        return {}


class EndsElsewhere(Sound):
    """What is left to do at the end changes what the model says."""

    def ending(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Edit]:
        return [] if any(isinstance(edit, _Scale) for edit in history(model)) else [_Scale(gain=1.5)]


class EndsForever(Sound):
    """There is always something left to do."""

    def ending(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Edit]:
        return [_Scale(gain=1.0)]


class KeepsAStateOutside(_After):
    """What decides the outputs is neither in the edits nor in the state dict."""

    def after(self, model: nn.Module, original: nn.Module, task: Task, strength: float) -> nn.Module:
        for module in model.modules():
            if isinstance(module, nn.GELU):
                module.approximate = "tanh"
        return model


class _Selfish(nn.GELU):
    def __deepcopy__(self, memo: Any) -> _Selfish:
        return self

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gain", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain


class SharesWithCopies(_After):
    def after(self, model: nn.Module, original: nn.Module, task: Task, strength: float) -> nn.Module:
        model.hidden[0][1] = _Selfish()
        return model


class _Noisy(nn.GELU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + 1e-3 * torch.rand(()))


class AddsNoise(_After):
    def after(self, model: nn.Module, original: nn.Module, task: Task, strength: float) -> nn.Module:
        model.hidden[0][1] = _Noisy().eval()
        return model


class StaysInTraining(_After):
    def after(self, model: nn.Module, original: nn.Module, task: Task, strength: float) -> nn.Module:
        return model.train()


class TakesAnyStrength(Sound):
    def apply(
        self, model: nn.Module, task: Task, strength: float, *, ignore: Sequence[str] = (), seed: int = 0
    ) -> nn.Module:
        return apply_edits(model, self.plan(model, task, min(max(strength, 0.0), 1.0)))


class TakesAnyModel(Sound):
    def apply(
        self, model: nn.Module, task: Task, strength: float, *, ignore: Sequence[str] = (), seed: int = 0
    ) -> nn.Module:
        return apply_edits(model, self.plan(model, task, strength, ignore=ignore))


class MovesTheHead(_After):
    def after(self, model: nn.Module, original: nn.Module, task: Task, strength: float) -> nn.Module:
        if strength > 0:
            model.head.bias.add_(1e-3)
        return model


class LooksAtValidation(_After):
    def after(self, model: nn.Module, original: nn.Module, task: Task, strength: float) -> nn.Module:
        len(task.val)
        return model


class UsesSamples(_After):
    def after(self, model: nn.Module, original: nn.Module, task: Task, strength: float) -> nn.Module:
        model.head.bias.add_(task.train.inputs.mean())
        return model


class UsesLabels(_After):
    def after(self, model: nn.Module, original: nn.Module, task: Task, strength: float) -> nn.Module:
        model.head.bias.add_((task.train.target[0] == 0).float())
        return model


class BecomesInfinite(_After):
    def after(self, model: nn.Module, original: nn.Module, task: Task, strength: float) -> nn.Module:
        if strength == 1:
            model.head.bias.fill_(float("inf"))
        return model


class _Detached(nn.GELU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


class CutsGradients(_After):
    def after(self, model: nn.Module, original: nn.Module, task: Task, strength: float) -> nn.Module:
        model.hidden[0][1] = _Detached()
        return model


class TracesAnyway(Sound):
    def applies_to(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Site]:
        if any(type(module).__name__ == "Guess" for module in model.modules()):
            raise Untraceable("no trace", "model.py:3")
        return super().applies_to(model, task, ignore=ignore)


class CutsAChannel(Sound):
    """A sound width procedure: one channel of the first layer is cut."""

    card = Card(kind="procedure", stage="width", **FACTS)

    def applies_to(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Site]:

        groups = structure(model, task.train.inputs, ignore=ignore).groups
        return [Site(group.name, group.kind, group.size) for group in groups]

    def plan(
        self, model: nn.Module, task: Task, strength: float, *, ignore: Sequence[str] = (), seed: int = 0
    ) -> list[Edit]:

        found = structure(model, task.train.inputs, ignore=ignore)
        return [found.slice({group.name: list(range(1, group.size)) for group in found.groups})]


#: check name -> the toys that it must catch.
BROKEN: dict[str, tuple[type[Procedure], ...]] = {
    "procedure-is-what-the-card-says": (OtherCard,),
    "strength-zero-is-the-identity": (MovesAtZero,),
    "strength-changes-the-model": (DoesNothing,),
    "original-is-untouched": (TurnsOriginalToEval, MovesOriginal, LeavesHook, DrawsGlobally),
    "same-seed-gives-the-same-model": (UsesGlobalRandomness,),
    "cost-never-rises-with-strength": (CostsMore,),
    "ignored-modules-stay": (IgnoresIgnore,),
    "reload-gives-the-same-outputs": (KeepsAStateOutside,),
    "ending-keeps-the-outputs": (EndsElsewhere, EndsForever),
    "deepcopy-keeps-outputs-and-history": (SharesWithCopies,),
    "eval-is-deterministic": (AddsNoise, StaysInTraining),
    "bad-strength-is-refused": (TakesAnyStrength,),
    "model-without-sites-is-refused": (TakesAnyModel,),
    "only-declared-sites-move": (MovesTheHead,),
    "selection-data-is-never-seen": (LooksAtValidation,),
    "undeclared-data-is-not-used": (UsesSamples,),
    "undeclared-labels-are-not-used": (UsesLabels,),
    "outputs-are-finite-at-any-batch-size": (BecomesInfinite,),
    "result-can-be-trained": (CutsGradients,),
    "untraceable-model-is-handled": (TracesAnyway,),
}


def follow(
    student: nn.Module, teacher: nn.Module, task: Task, *, steps: int, seed: int = 0, deadline: float | None = None
) -> int:
    """Train the student on the teacher's outputs, one random sample a step."""
    if steps < 0:
        raise BadInput(f"steps must be at least 0, got {steps}")
    draw = torch.Generator().manual_seed(seed)
    teacher = copy.deepcopy(teacher).eval()
    moving = [value for value in student.parameters() if value.requires_grad]
    optimizer = torch.optim.SGD(moving, lr=1e-3)
    for step in range(steps):
        if deadline is not None and time.monotonic() > deadline:
            return step
        rows = torch.randint(len(task.train), (16,), generator=draw)
        inputs = task.train.inputs[rows]
        with torch.no_grad():
            wanted = teacher(inputs)
        optimizer.zero_grad()
        (student(inputs) - wanted).square().mean().backward()
        optimizer.step()
    return steps


def _moves_at_zero(student: nn.Module, teacher: nn.Module, task: Task, **options: Any) -> None:
    follow(student, teacher, task, **{**options, "steps": options["steps"] + 1})


def _moves_the_teacher(student: nn.Module, teacher: nn.Module, task: Task, **options: Any) -> None:
    teacher.eval()
    follow(student, teacher, task, **options)


_CALLS = itertools.count()


def _forgets_the_seed(student: nn.Module, teacher: nn.Module, task: Task, **options: Any) -> None:
    follow(student, teacher, task, **{**options, "seed": next(_CALLS)})


def _is_deaf_to_the_seed(student: nn.Module, teacher: nn.Module, task: Task, **options: Any) -> None:
    follow(student, teacher, task, **{**options, "seed": 0})


def _runs_away(student: nn.Module, teacher: nn.Module, task: Task, *, steps: int, seed: int = 0) -> None:
    with torch.no_grad():
        for value in student.parameters():
            value.mul_(1.0 + 0.1 * steps)


def _thaws(student: nn.Module, teacher: nn.Module, task: Task, **options: Any) -> None:
    follow(student.requires_grad_(), teacher, task, **options)


def _peeks(student: nn.Module, teacher: nn.Module, task: Task, **options: Any) -> None:
    len(task.test)
    follow(student, teacher, task, **options)


def _is_late(
    student: nn.Module, teacher: nn.Module, task: Task, *, steps: int, seed: int = 0, deadline: float = 0
) -> None:
    follow(student, teacher, task, steps=min(steps, 300), seed=seed)


def _takes_any_steps(student: nn.Module, teacher: nn.Module, task: Task, *, steps: int, **options: Any) -> None:
    follow(student, teacher, task, steps=max(steps, 0), **options)


#: check name -> the recovery functions that it must catch.
BROKEN_RECOVERY: dict[str, tuple[Callable[..., Any], ...]] = {
    "no-steps-change-nothing": (_moves_at_zero,),
    "teacher-and-surroundings-stay": (_moves_the_teacher,),
    "same-seed-trains-the-same-student": (_forgets_the_seed, _is_deaf_to_the_seed),
    "student-comes-closer": (_runs_away,),
    "frozen-parameters-stay": (_thaws,),
    "recovery-sees-training-samples-only": (_peeks,),
    "deadline-is-kept": (_is_late,),
    "bad-steps-are-refused": (_takes_any_steps,),
}


def subject(entry: Any, card: Card = CARD) -> Subject:
    """Return ``entry`` as something that can be checked."""
    return Subject(card=card, entry=entry, module=types.ModuleType("toy"))


CHECK = {check.name: check for check in CHECKS}
GENERAL = [check.name for check in checks_for(CARD) if check.function.__module__.endswith(".cards")]


@pytest.mark.parametrize("name", [c.name for c in checks_for(CARD) if c.name not in GENERAL])
def test_sound_procedure_passes(name: str) -> None:
    result = run_check(CHECK[name], subject(Sound))
    assert result.outcome == "passed", result.reason


@pytest.mark.parametrize(("name", "toy"), [(name, toy) for name, toys in BROKEN.items() for toy in toys])
def test_broken_procedure_is_caught(name: str, toy: type[Procedure]) -> None:
    result = run_check(CHECK[name], subject(toy))
    assert result.outcome == "failed"
    assert "(at " not in result.reason, "the toy crashed instead of failing the check"


@pytest.mark.parametrize("name", BROKEN_RECOVERY)
def test_sound_recovery_passes(name: str) -> None:
    result = run_check(CHECK[name], subject(follow, RECOVERY))
    assert result.outcome == "passed", result.reason


@pytest.mark.parametrize(("name", "toy"), [(name, toy) for name, toys in BROKEN_RECOVERY.items() for toy in toys])
def test_broken_recovery_is_caught(name: str, toy: Callable[..., Any]) -> None:
    result = run_check(CHECK[name], subject(toy, RECOVERY))
    assert result.outcome == "failed"
    assert "(at " not in result.reason, "the toy crashed instead of failing the check"


def test_slicing_that_does_not_equal_masking_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:

    check = CHECK["removed-equals-masked"]
    toy = subject(CutsAChannel, CutsAChannel.card)
    result = run_check(check, toy)
    assert result.outcome == "passed", result.reason
    sound = Structure.slice

    def misaligned(self: Structure, keep: Mapping[str, Sequence[int]]) -> Slice:
        """Keep the last entries of one tensor where the tensors coupled with it keep others."""
        cut = sound(self, keep)
        name, cuts = next(iter(cut.tensors.items()))
        dim, runs = next(iter(cuts.items()))
        size = next(before for _, before in cut.units.values())
        flipped = tuple((size - stop, size - start) for start, stop in reversed(runs))
        return cut.model_copy(update={"tensors": {**cut.tensors, name: {**cuts, dim: flipped}}})

    monkeypatch.setattr(Structure, "slice", misaligned)
    result = run_check(check, toy)
    assert result.outcome == "failed"
    assert "(at " not in result.reason, result.reason


DOC = """Split a matrix in two.

`A toy paper <https://example.org/toy>`_

    W = U V

Departures: none

Example:
    >>> 1 + 1
    2
"""


def _module(tmp_path: Path, doc: str = DOC, code: str = "import torch\n") -> types.ModuleType:
    path = tmp_path / "toy.py"
    path.write_text(code)
    module = types.ModuleType("toy", doc)
    module.__file__ = str(path)
    return module


class Undocumented(Sound):
    def __init__(self, *, share: float = 0.5, speed: float = 1.0) -> None:
        super().__init__(share=share)


class Loose(Sound):
    def __init__(self, **options: float) -> None:
        super().__init__()


_SIBLING = "from torchgraft.shrink.prune.magnitude_pruning import magnitude_scores\n"

#: check name -> what is wrong -> (card, docstring, source, entry)
BROKEN_CARDS: dict[str, dict[str, dict[str, Any]]] = {
    "card-is-indexed": {"not there": {}},
    "reference-is-an-address": {
        "another link": {"doc": DOC.replace("org/toy", "org/other")},
        "no path": {"card": {"reference": "https://nowhere"}},
    },
    "bibtex-is-whole": {
        "open brace": {"card": {"bibtex": "@misc{toy, title={A}, author={B}, year={2026}"}},
        "closes early": {"card": {"bibtex": "@misc{toy, title={A}}, author={B}, year={2026}"}},
        "no year": {"card": {"bibtex": "@misc{toy, title={A}, author={B}}"}},
        "no key": {"card": {"bibtex": "@misc{title={A}, author={B}, year={2026}}"}},
    },
    "docstring-has-its-parts": {
        "no sentence": {"doc": DOC.replace("in two.", "in two")},
        "no equation": {"doc": DOC.replace("W = U V", "W")},
        "no departures": {"doc": DOC.replace("Departures: none", "")},
    },
    "entry-is-documented": {"argument left out": {"entry": Undocumented}, "**options": {"entry": Loose}},
    "examples-run": {"wrong": {"doc": DOC.replace("    2", "    3")}, "none": {"doc": DOC.replace(">>> ", "")}},
    "module-stands-alone": {"sibling": {"code": _SIBLING}},
}


def _broken(tmp_path: Path, card: Any = None, doc: str = DOC, code: str = "", entry: Any = Sound) -> Subject:
    facts = Card(kind="procedure", stage="rank", **{**FACTS, **(card or {})})
    return Subject(card=facts, entry=entry, module=_module(tmp_path, doc, code))


@pytest.mark.parametrize("name", [name for name in GENERAL if name != "card-is-indexed"])
def test_sound_card_passes(name: str, tmp_path: Path) -> None:
    result = run_check(CHECK[name], _broken(tmp_path))
    assert result.outcome == "passed", result.reason


@pytest.mark.parametrize(("name", "what"), [(name, what) for name, cases in BROKEN_CARDS.items() for what in cases])
def test_broken_card_is_caught(name: str, what: str, tmp_path: Path) -> None:
    import torchgraft.shrink.prune.magnitude_pruning  # noqa: F401  (a sibling that is loaded)

    result = run_check(CHECK[name], _broken(tmp_path, **BROKEN_CARDS[name][what]))
    assert result.outcome == "failed"
    assert "(at " not in result.reason, "the check crashed instead of failing"


def test_every_check_has_a_toy_that_it_catches() -> None:
    shown = {*BROKEN, *BROKEN_RECOVERY, *BROKEN_CARDS, "removed-equals-masked"}
    elsewhere = (*elastic.CHECKS, *modules.CHECKS, *mixers.CHECKS, *attention.CHECKS, *memories.CHECKS, *norms.CHECKS)
    assert shown == set(CHECK) - {check.name for check in elsewhere}
