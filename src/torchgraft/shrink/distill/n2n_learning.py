"""Let a policy learn, by reward, which layers of a teacher to remove and how far to shrink the others.

`N2N Learning: Network to Network Compression via Policy Gradient Reinforcement Learning
<https://arxiv.org/abs/1709.06030>`_ (Ashok et al., 2018): R = (A_student / A_teacher) C (2 - C), C = 1 - parameters of
the student / of the teacher, -1 where there is no such student; grad J = (1/m) sum_k grad log pi(a_k) (R_k - b).

Departures:
- layers that may be removed are blocks that keep the shape of what they pass on, and widths are those of coupled groups
  (the paper re-fits channels, and shrinks kernels and padding too); students inherit the teacher's weights, the shrunk
  ones those of the strongest units, before they are distilled;
- the penalty's eps stays 0 after its 15 epochs, where (1 - epoch / 15)^4 would rise again;
- :class:`N2NLearning` (the procedure) has a dial where the paper has one student: blocks go in the order of the
  probability with which the trained removal policy keeps them. Where scores are not positive (squared errors), A is one
  over the loss.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from torchgraft.bench.meters import params
from torchgraft.bench.task import Inputs, Task
from torchgraft.catalogue import Card, Claim
from torchgraft.engines.depth import Stack
from torchgraft.engines.network_policy import (
    RemovalPolicy,
    RemovalSpace,
    ShrinkPolicy,
    ShrinkSpace,
    distilled_score,
    layer_states,
    removable,
    removal,
)
from torchgraft.engines.policy_gradient import EmaBaseline, Episode, reinforce_loss
from torchgraft.engines.procedure import Procedure, Site
from torchgraft.engines.surgery.edits import Edit, apply_edits
from torchgraft.errors import BadInput

__all__ = [
    "CARD",
    "N2NCompressor",
    "N2NLearning",
    "RemovalPolicy",
    "ShrinkPolicy",
    "Trial",
    "distilled_score",
    "layer_states",
    "n2n_reward",
]

CARD = Card(
    key="n2n-learning",
    title="N2N learning: network compression by policy gradient",
    seed_id=5,
    authors="Ashok et al., 2018",
    reference="https://arxiv.org/abs/1709.06030",
    family="shrink/distill",
    kind="procedure",
    engine=("search", "surgery"),
    equation="R = (A_s / A_t) C (2 - C), C = 1 - P_s / P_t; grad J = (1/m) sum_k grad log pi(a_k) (R_k - b)",
    entry="N2NLearning",
    stage="depth",
    capabilities=frozenset({"needs-data", "needs-labels", "needs-training"}),
    example={"epochs": 2, "rollouts": 2, "steps": 2},
    oracles=(
        "R is 0 for the teacher itself and A_s / A_t at full compression, with slope 2 (1 - C) in C; -1 where no"
        " student can be built; under a broken constraint it falls from R to -1 as eps falls from 1 to 0",
        "both policies' log-probabilities sum to one over all action strings, and averaged estimates of the gradient"
        " match the exact one of E[R] within 3 standard errors, with and without a baseline",
        "keeping all layers, or ratios of 1, rebuild the teacher: same modules, same outputs",
        "on a table of rewards the policy ends on the best string",
    ),
    claim=Claim(
        text="digits CNN of a convolution and five residual blocks of one, width 32; removal, then shrinking, each new"
        " student distilled for two epochs, against random actions with the same budget and a uniform shrink of equal"
        " size, all trained on alike",
        figure=">= 8x fewer parameters within 1.5 points of the teacher, and the policies' mean reward over their last"
        " epochs >= random's mean + 0.05; means of 3 seeds",
    ),
    choose_when="dozens of short trainings can be spent on finding the architecture of one small student",
    choose_instead="an importance score (optin-pruning, taylor-pruning) where one decision in seconds must do;"
    " transformable-architecture-search where one longer training is affordable and many short ones are not",
    bibtex="""@inproceedings{ashok2018n2n,
  title={{N2N} Learning: Network to Network Compression via Policy Gradient Reinforcement Learning},
  author={Ashok, Anubhav and Rhinehart, Nicholas and Beainy, Fares and Kitani, Kris M.},
  booktitle={International Conference on Learning Representations},
  year={2018}
}""",
)


def n2n_reward(
    accuracy: float,
    parameters: int,
    teacher_accuracy: float,
    teacher_parameters: int,
    *,
    constraint: Mapping[str, float] | None = None,
    epoch: int = 0,
) -> float:
    """Return the reward of a student.

    Args:
        accuracy: of the student.
        parameters: of the student.
        teacher_accuracy: of the teacher, above zero.
        teacher_parameters: of the teacher.
        constraint: ``{"parameters": most}``, ``{"accuracy": least}`` or both. Where one is broken the reward is
            (eps - 1) + eps R, eps = max(0, 1 - epoch / 15)^4.
        epoch: of the search, which hardens the constraint.

    Example:
        >>> n2n_reward(0.9, 25, 0.9, 100), n2n_reward(0.9, 100, 0.9, 100)
        (0.9375, 0.0)

    Raises:
        BadInput: the teacher is worth nothing, or the constraint is of another kind.
    """
    if not teacher_accuracy > 0 or teacher_parameters < 1:
        raise BadInput(f"a teacher needs accuracy > 0 and parameters, got {teacher_accuracy}, {teacher_parameters}")
    wanted = dict(constraint or {})
    if unknown := wanted.keys() - {"parameters", "accuracy"}:
        raise BadInput(f"constraint is on 'parameters' or 'accuracy', got {sorted(unknown)}")
    compression = 1.0 - parameters / teacher_parameters
    reward = accuracy / teacher_accuracy * compression * (2.0 - compression)
    if parameters > wanted.get("parameters", float("inf")) or accuracy < wanted.get("accuracy", -float("inf")):
        eps = max(0.0, 1.0 - epoch / 15) ** 4
        return (eps - 1.0) + eps * reward
    return reward


@dataclass(frozen=True)
class Trial:
    """One student that was tried.

    Args:
        epoch: of the search.
        actions: what the policy chose for every layer.
        accuracy: of the student after its short training; 0 where it could not be built.
        parameters: of the student; the teacher's where it could not be built.
        reward: R.
    """

    epoch: int
    actions: tuple[int, ...]
    accuracy: float
    parameters: int
    reward: float


class N2NCompressor:
    """The search for one student: a policy draws architectures, each is trained for a little, rewards move the policy.

    Args:
        teacher: the model, left as it was.
        evaluate: ``evaluate(student)`` trains the student in place for a little and returns its accuracy, above zero
            for the teacher; see :func:`distilled_score`.
        example: inputs of the teacher.
        stage: ``"remove"`` whole blocks, or ``"shrink"`` widths.
        rollouts: students an epoch, m.
        epochs: of the search.
        constraint: see :func:`n2n_reward`; rewards of repeated architectures are kept only without one.
        teacher_accuracy: default: what ``evaluate`` says of a copy of the teacher.
        teacher_parameters: what compression is measured against; default: the teacher's.
        least_units: fewest units that a width is shrunk to (all of them, where there are fewer).
        lr: Adam's, of the policy.
        decay: of the baseline.
        ignore: globs of module names that must stay as they are.
        seed: of policy and actions.
    """

    def __init__(
        self,
        teacher: nn.Module,
        evaluate: Callable[[nn.Module], float],
        *,
        example: Inputs,
        stage: Literal["remove", "shrink"] = "remove",
        rollouts: int = 5,
        epochs: int = 10,
        constraint: Mapping[str, float] | None = None,
        teacher_accuracy: float | None = None,
        teacher_parameters: int | None = None,
        least_units: int = 10,
        lr: float = 0.003,
        decay: float = 0.9,
        ignore: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        if stage not in ("remove", "shrink"):
            raise BadInput(f"stage must be 'remove' or 'shrink', got {stage!r}")
        if rollouts < 1 or epochs < 0 or least_units < 1:
            raise BadInput(
                f"rollouts and least_units must be at least 1, epochs 0; got {rollouts}, {least_units}, {epochs}"
            )
        n2n_reward(1.0, 1, 1.0, 1, constraint=constraint)  # refuses a constraint of another kind
        self.teacher, self.evaluate, self.stage, self.constraint = teacher, evaluate, stage, constraint
        self.rollouts, self.epochs, self.lr, self.decay = rollouts, epochs, lr, decay
        self.teacher_accuracy, self.seed = teacher_accuracy, seed
        self.teacher_parameters = params(teacher) if teacher_parameters is None else teacher_parameters
        space = RemovalSpace(teacher, example, ignore) if stage == "remove" else None
        self.space = space or ShrinkSpace(teacher, example, ignore, least_units=least_units)
        if not self.space.layers:
            raise BadInput(f"n2n-learning finds nothing to {stage} in {type(teacher).__name__}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            kind = RemovalPolicy if stage == "remove" else ShrinkPolicy
            self.policy: RemovalPolicy | ShrinkPolicy = kind(self.space.states.shape[1])

    def fit(self) -> tuple[nn.Module, list[Trial]]:
        """Return the student of the highest reward and all that were tried; the teacher where none was built."""
        known: dict[tuple[int, ...], tuple[float, int]] = {}
        best, student = -float("inf"), copy.deepcopy(self.teacher)
        history: list[Trial] = []
        baseline = EmaBaseline(decay=self.decay)
        optimizer = torch.optim.Adam(self.policy.parameters(), lr=self.lr)
        generator = torch.Generator().manual_seed(self.seed)
        if self.teacher_accuracy is None:
            self.teacher_accuracy = float(self.evaluate(copy.deepcopy(self.teacher)))
        for epoch in range(self.epochs):
            log_probs, rewards = [], []
            for _ in range(self.rollouts):
                episode = Episode(generator=generator)
                actions = self.policy.act(self.space.states, episode)
                made: nn.Module | None = None
                try:
                    sizes = self.space.sizes(actions)
                    if sizes not in known or self.constraint:
                        made = apply_edits(self.teacher, self.space.edits(actions))
                        known[sizes] = float(self.evaluate(made)), params(made)
                    accuracy, size = known[sizes]
                    reward = n2n_reward(
                        accuracy,
                        size,
                        self.teacher_accuracy,
                        self.teacher_parameters,
                        constraint=self.constraint,
                        epoch=epoch,
                    )
                except BadInput:
                    accuracy, size, reward, made = 0.0, self.teacher_parameters, -1.0, None
                if made is not None and reward > best:
                    best, student = reward, made
                history.append(Trial(epoch, actions, accuracy, size, reward))
                log_probs.append(episode.log_prob)
                rewards.append(reward)
            loss = reinforce_loss(torch.stack(log_probs), baseline.advantages(torch.tensor(rewards)))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return student, history


class N2NLearning(Procedure):
    """Removal of blocks in the order of the probability with which a trained removal policy keeps them.

    Args:
        epochs: of the search.
        rollouts: students an epoch.
        steps: of distillation of each student.
        weight: of the distance between logits in it.
        held_out: share of the training samples on which students are scored.
        lr: of the policy.

    Example:
        >>> class Residual(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.fc = nn.Linear(6, 6)
        ...     def forward(self, x):
        ...         return x + self.fc(x).relu()
        >>> x, y = torch.randn(32, 6), torch.randint(0, 6, (32,))
        >>> model = nn.Sequential(*(Residual() for _ in range(4)))
        >>> hit = lambda out, t: (out.argmax(1) == t).float()
        >>> task = Task(model, (x, y), (x, y), (x, y), nn.functional.cross_entropy, hit)
        >>> len(N2NLearning(epochs=1, rollouts=2, steps=1).apply(model, task, 0.5))
        2
    """

    card = CARD
    expense = 3

    def __init__(
        self,
        *,
        epochs: int = 20,
        rollouts: int = 5,
        steps: int = 30,
        weight: float = 0.1,
        held_out: float = 0.25,
        lr: float = 0.015,
    ) -> None:
        if epochs < 1 or rollouts < 1 or steps < 0 or not 0 < held_out < 1:
            raise BadInput(
                "epochs and rollouts must be at least 1, steps 0 and held_out in (0, 1);"
                f" got {epochs}, {rollouts}, {steps} and {held_out}"
            )
        self.epochs, self.rollouts, self.steps = epochs, rollouts, steps
        self.weight, self.held_out, self.lr = weight, held_out, lr

    def applies_to(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Site]:
        """Return the stacks from which blocks may go."""
        return [
            Site(f"{stack.name or '(model)'}:{stack.first}", "layers", stack.length, sum(stack.parameters))
            for stack in removable(model, task.train[:2].inputs, ignore)
        ]

    def plan(
        self, model: nn.Module, task: Task, strength: float, *, ignore: Sequence[str] = (), seed: int = 0
    ) -> list[Edit]:
        """Return the removal of the blocks least likely kept, till ``strength`` of what can go is gone."""
        found = removable(model, task.train[:2].inputs, ignore)
        left = {stack: stack.length - stack.least for stack in found}
        order = []
        for stack, place in self._order(model, task, found, tuple(ignore), seed):
            if left[stack]:
                left[stack] -= 1
                order.append((stack.blocks[place], stack.parameters[place]))
        target = strength * sum(size for _, size in order)
        gone, saved = set(), 0
        for name, size in order:
            if saved >= target * (1 - 1e-9):
                break
            gone.add(name)
            saved += size
        return removal(found, gone)

    def _order(
        self, model: nn.Module, task: Task, found: Sequence[Stack], ignore: tuple[str, ...], seed: int
    ) -> list[tuple[Stack, int]]:
        """Return all blocks, the one least likely kept first; searched once for an unchanged model."""
        values = (*model.named_parameters(), *model.named_buffers())
        key = (
            tuple((name, value.data_ptr(), value._version) for name, value in values),
            tuple(sorted(vars(self).items())),
            ignore,
            seed,
        )
        for known_model, known_task, known_key, known in _ORDERS:
            if known_model() is model and known_task() is task and known_key == key:
                return known
        shuffled = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(seed))
        count = max(1, round(self.held_out * len(task.train)))
        first, second = task.train[shuffled[count:]], task.train[shuffled[:count]]
        inner = Task(
            model=model,
            train=first,
            val=second,
            test=second,
            loss=task.loss,
            score=task.score,
            batch_size=task.batch_size,
            logits=task.logits,
            distill=task.distill,
            learning_rate=task.learning_rate,
        )
        teacher = copy.deepcopy(model).eval().requires_grad_(True)
        score = distilled_score(inner, teacher, steps=self.steps, weight=self.weight, seed=seed)
        search = N2NCompressor(
            teacher,
            score,
            example=task.train[:2].inputs,
            rollouts=self.rollouts,
            epochs=self.epochs,
            lr=self.lr,
            ignore=ignore,
            seed=seed,
        )
        search.fit()
        with torch.no_grad():
            logits = search.policy(search.space.states)
        places = [(stack, place) for stack in found for place in range(stack.length)]
        made = [places[index] for index in torch.argsort(logits, stable=True).tolist()]
        _ORDERS.append((weakref.ref(model), weakref.ref(task), key, made))
        del _ORDERS[:-8]
        return made


_ORDERS: list[tuple[Callable[[], nn.Module | None], Callable[[], Task | None], Any, list[tuple[Stack, int]]]] = []
