"""The contract of recovery: procedures without a stage, which train a changed model to follow its original.

The entry is called as ``entry(student, teacher, task, *, steps, seed, deadline, ...)`` and trains the student in
place.
"""

from __future__ import annotations

import copy
import time

import torch
from torch import nn

from torchgraft.catalogue import Card
from torchgraft.contracts.check import Check, Subject, require
from torchgraft.contracts.sameness import fittings, same_state, surroundings
from torchgraft.contracts.subjects import MODELS, Case, Guarded, case, output, settings
from torchgraft.errors import BadInput

__all__ = ["CHECKS"]

_STEPS = 3


def _pair(tiny: Case) -> tuple[nn.Module, nn.Module]:
    return tiny.build(5), tiny.model


def _trained(subject: Subject, tiny: Case, *, steps: int = _STEPS, seed: int = 0) -> nn.Module:
    student, teacher = _pair(tiny)
    subject.entry(student, teacher, tiny.task, steps=steps, seed=seed, **settings(subject.card))
    return student


def _gap(student: nn.Module, tiny: Case) -> float:
    """Return how far the student's answers on the training inputs are from the teacher's, as a KL divergence."""
    inputs = tiny.task.train.inputs
    wanted = output(tiny.model, inputs).log_softmax(-1)
    found = output(student, inputs).log_softmax(-1)
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def check_no_steps_change_nothing(subject: Subject) -> None:
    """With 0 steps the student is bit for bit what it was."""
    for name in MODELS:
        tiny = case(name)
        same_state(tiny.build(5), _trained(subject, tiny, steps=0), f"{name}: after 0 steps")


def check_teacher_and_surroundings_stay(subject: Subject) -> None:
    """The teacher, its modes and hooks, the random state, threads and modes are as they were."""
    for name in MODELS:
        tiny = case(name)
        student, teacher = _pair(tiny)
        teacher.train()
        before, parts, around = copy.deepcopy(teacher), fittings(teacher), surroundings()
        subject.entry(student, teacher, tiny.task, steps=_STEPS, **settings(subject.card))
        for what, value in surroundings().items():
            require(value == around[what], f"{name}: {what} changed")
        for what, value in fittings(teacher).items():
            require(value == parts[what], f"{name}: the {what} of the teacher changed")
        same_state(before, teacher, f"{name}: the teacher")


def check_same_seed_trains_the_same_student(subject: Subject) -> None:
    """Trained twice with one seed, the students are bit for bit equal; with another seed they are not."""
    for name in MODELS:
        tiny = case(name)
        first = _trained(subject, tiny)
        with torch.random.fork_rng():
            torch.manual_seed(999)
            second = _trained(subject, tiny)
        same_state(first, second, f"{name}: two runs with seed 0")
        other = _trained(subject, tiny, seed=1)
        same = all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
        require(not same, f"{name}: seeds 0 and 1 give the same student")


def check_student_comes_closer(subject: Subject) -> None:
    """After thirty steps the student's answers are closer to the teacher's than before."""
    for name in MODELS:
        tiny = case(name)
        before, after = _gap(tiny.build(5), tiny), _gap(_trained(subject, tiny, steps=30), tiny)
        require(after < before, f"{name}: the divergence from the teacher goes from {before:.4g} to {after:.4g}")


def check_frozen_parameters_stay(subject: Subject) -> None:
    """A parameter of the student that requires no gradient does not move."""
    tiny = case("mlp")
    student, teacher = _pair(tiny)
    frozen = next(student.parameters()).requires_grad_(False)
    before = frozen.clone()
    subject.entry(student, teacher, tiny.task, steps=_STEPS, **settings(subject.card))
    moved = (frozen - before).abs().max().item()
    require(moved == 0.0, f"a frozen parameter moved by {moved:.3g}")


def check_recovery_sees_training_samples_only(subject: Subject) -> None:
    """Validation and test samples are not looked at."""
    tiny = case("mlp")
    student, teacher = _pair(tiny)
    guarded = Guarded(tiny.task, ("val", "test"))
    subject.entry(student, teacher, guarded, steps=_STEPS, **settings(subject.card))
    require(not guarded.seen, f"looked at {guarded.seen}")


def check_deadline_is_kept(subject: Subject) -> None:
    """With a deadline that has passed, hardly a step is taken: the student is that of at most one step."""
    tiny = case("mlp")
    student, teacher = _pair(tiny)
    subject.entry(student, teacher, tiny.task, steps=10_000, deadline=time.monotonic() - 1.0, **settings(subject.card))
    pairs = zip(student.parameters(), tiny.build(5).parameters(), strict=True)
    moved = max((now - then).abs().max().item() for now, then in pairs)
    # One step of AdamW moves a parameter by no more than about its learning rate.
    require(moved <= 2 * tiny.task.learning_rate, f"parameters moved by {moved:.3g} after the deadline")


def check_bad_steps_are_refused(subject: Subject) -> None:
    """A negative number of steps is refused by a one-line BadInput."""
    tiny = case("mlp")
    student, teacher = _pair(tiny)
    try:
        subject.entry(student, teacher, tiny.task, steps=-1, **settings(subject.card))
    except BadInput as error:
        require("\n" not in str(error), f"the refusal has several lines: {error}")
    else:
        require(False, "steps = -1 is accepted")


def _recovers(card: Card) -> bool:
    return card.kind == "procedure" and card.stage is None and "elastic" not in card.capabilities


CHECKS = tuple(
    Check(function, _recovers)
    for function in (
        check_no_steps_change_nothing,
        check_teacher_and_surroundings_stay,
        check_same_seed_trains_the_same_student,
        check_student_comes_closer,
        check_frozen_parameters_stay,
        check_recovery_sees_training_samples_only,
        check_deadline_is_kept,
        check_bad_steps_are_refused,
    )
)
