"""Compare mixers as a survey of transformer successors does: one block, equal parameters, several kinds of task.

Paper: `What comes after transformers? A selective survey connecting ideas in deep learning
<https://arxiv.org/abs/2408.00386>`_.

Equation: ``y_t = g(sum_{s <= t} A(t, s; x) v_s)``, where the mixers differ in A.

Departures: the paper compares in words, so the experiment is ours. The tags condense its headings and are derived from
each card; its status of an idea ("proven" to "far-out") is an opinion on the field that no card can tell, and is left
out. The catalogue keeps the verdict on each claim instead.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchgraft.bench.task import Task
from torchgraft.bench.tasks.stdlib_bytes import minus_bits
from torchgraft.bench.training import evaluate_loss
from torchgraft.catalogue.card import FAMILIES, Card, Claim
from torchgraft.errors import BadInput
from torchgraft.parts.blocks.sequence_model import Build, SequenceModel
from torchgraft.parts.blocks.sequence_training import accuracy, accuracy_by_length, bits_per_byte, train_mixer

__all__ = ["CARD", "TAGS", "Compared", "compare_mixers", "matched_hidden", "tags"]

CARD = Card(
    key="after-transformers-survey",
    title="What comes after transformers: mixers compared in one block",
    seed_id=31,
    authors="Schneider, 2024",
    reference="https://arxiv.org/abs/2408.00386",
    family="parts/mixers",
    kind="analysis",
    engine=("recurrence", "attention"),
    equation="y_t = g(sum_{s <= t} A(t, s; x) v_s)",
    entry="compare_mixers",
    oracles=(
        "the models that are compared have the same number of parameters within 3 %",
        "the state bytes that are reported are those of the tensors, and do not grow with t but for softmax attention",
        "every card of the catalogue has at least one tag of the closed vocabulary",
        "every mixer that is compared gives the same numbers in parallel and step by step, and sees no later token",
    ),
    claim=Claim(
        text="Softmax attention, gated linear attention and an LSTM in the same model of two blocks and width 64 with "
        "equal parameters: bytes of the standard library, associative recall, and parity up to 4 times the trained "
        "length.",
        figure="gated linear attention within 0.05 bits a byte of softmax, with a state that does not grow; softmax at "
        "least 10 points above it on recall; on parity at 128 digits the LSTM >= 0.95 and each other one below 0.95",
    ),
    choose_when="You want to know which mixer suits a task of your own, under equal parameters and equal steps.",
    choose_instead="torchgraft try, where several seeds, a table and a figure are wanted and equal widths will do.",
    confidence="medium",
    bibtex="""@article{schneider2024after,
  title={What comes after transformers? -- A selective survey connecting ideas in deep learning},
  author={Schneider, Johannes},
  journal={arXiv preprint arXiv:2408.00386},
  year={2024}
}""",
)

#: What a method is about, and the pattern of innovation that it follows.
TAGS: dict[str, tuple[str, ...]] = {
    "area": (
        *("loss", "regularisation", "optimisation", "normalisation", "layer", "architecture"),
        *("compression", "adaptation", "search", "understanding", "application"),
    ),
    "pattern": (
        *("gating", "hierarchy", "sparsity", "conditional computation", "divide and conquer", "structure", "noise"),
        *("decoupling", "attention-like weighting", "normalising", "memory", "iteration"),
    ),
}
_AREAS = {
    "parts/norms": "normalisation",
    "parts/blocks": "architecture",
    "parts/graphs": "architecture",
    "parts": "layer",
    "train/objectives": "loss",
    "train/rules": "optimisation",
    "train": "optimisation",
    "shrink": "compression",
    "elastic": "architecture",
    "adapt": "adaptation",
    "search": "search",
    "analyze": "understanding",
    "retrieve": "application",
    "generate": "application",
    "solve": "application",
    "recipes": "application",
}
_PATTERNS = {
    "recurrence": ("memory", "iteration"),
    "attention": ("attention-like weighting",),
    "longconv": ("hierarchy",),
    "parametrize": ("structure",),
    "normalize": ("normalising",),
    "masks": ("sparsity",),
    "nesting": ("hierarchy", "conditional computation"),
    "rules": ("decoupling",),
    "solvers": ("iteration",),
    "messages": ("structure",),
}


def tags(card: Card) -> frozenset[str]:
    """Return the tags of ``card``, all of :data:`TAGS`: its area, and the patterns that its engines stand for.

    Example:
        >>> sorted(tags(CARD))
        ['attention-like weighting', 'iteration', 'layer', 'memory']

    Raises:
        BadInput: the family of the card has no area.
    """
    area = _AREAS.get(card.family, _AREAS.get(card.family.split("/")[0]))
    if area is None:
        raise BadInput(f"family {card.family!r} of {card.key!r} has no area; the families are {', '.join(FAMILIES)}")
    gated = ("gating",) if "gate" in f"{card.title} {card.equation}".lower() else ()
    return frozenset({area, *gated, *(tag for engine in card.engine for tag in _PATTERNS.get(engine, ()))})


@dataclass(frozen=True)
class Compared:
    """One mixer on one task.

    Args:
        mixer: its name.
        task: the name of the task.
        parameters: of the whole model.
        loss: the task's loss on the test split.
        score: bits a byte on a task that is scored so (lower is better), else the share of right answers.
        by_length: the share of right answers at each length of the test samples.
        tokens_per_second: in training.
        state_bytes: what one sequence of the test's length costs to remember; ``None`` where no state is kept.
        state_bytes_later: the same for twice as many tokens.
    """

    mixer: str
    task: str
    parameters: int
    loss: float
    score: float
    by_length: dict[int, float]
    tokens_per_second: float
    state_bytes: int | None
    state_bytes_later: int | None


def _parameters(task: Task, mixer: str | Build, d_model: int, layers: int, hidden: int | None) -> int:
    with torch.random.fork_rng(devices=[]):
        model = SequenceModel.for_task(task, d_model, layers, mixer, hidden=hidden)
    return sum(value.numel() for value in model.parameters())


def matched_hidden(
    task: Task, mixer: str | Build, target: int, *, d_model: int, layers: int, tolerance: float = 0.03
) -> int:
    """Return the width of the SwiGLU with which a model has ``target`` parameters within ``tolerance``.

    Args:
        task: decides embedding and head.
        mixer: key of a mixer, or a function from the width to one.
        target: the wanted number of parameters.
        d_model: width.
        layers: blocks.
        tolerance: the largest relative difference.

    Raises:
        BadInput: no width gives so few parameters.
    """
    one = _parameters(task, mixer, d_model, layers, 1)
    hidden = max(1, 1 + round((target - one) / (3 * d_model * layers)))
    found = _parameters(task, mixer, d_model, layers, hidden)
    if abs(found - target) > tolerance * target:
        raise BadInput(
            f"a model with this mixer has {found} parameters at the least, and {target} are wanted; choose a mixer "
            "with fewer heads or keys, or put the largest mixer first"
        )
    return hidden


def compare_mixers(
    tasks: Sequence[Task],
    mixers: Mapping[str, str | Build],
    *,
    steps: int | Mapping[str, int] = 400,
    d_model: int = 64,
    layers: int = 2,
    batch_size: int = 32,
    lr: float | Mapping[str, float] = 3e-3,
    seed: int = 0,
    tolerance: float = 0.03,
) -> list[Compared]:
    """Train each mixer on each task in models of equal size and return what was measured.

    Args:
        tasks: tasks on sequences.
        mixers: keys of mixers, or functions from the width to one, by name. The model of the first has a SwiGLU of the
            usual width, and the others get one that makes their models as large.
        steps: optimiser steps of every run, or by the name of the task.
        d_model: width.
        layers: blocks.
        batch_size: samples a step.
        lr: the highest learning rate, or by the name of the task.
        seed: decides weights and order of the data.
        tolerance: the largest relative difference in the number of parameters.

    Raises:
        BadInput: nothing is to be compared, a task is not on sequences, or sizes cannot be matched.
    """
    if not tasks or not mixers:
        raise BadInput(f"compare_mixers needs tasks and mixers, got {len(tasks)} and {len(mixers)}")
    found = []
    for task in tasks:
        target = _parameters(task, next(iter(mixers.values())), d_model, layers, None)
        for name, mixer in mixers.items():
            hidden = matched_hidden(task, mixer, target, d_model=d_model, layers=layers, tolerance=tolerance)
            count = steps if isinstance(steps, int) else steps[task.name]
            begun = time.perf_counter()
            model = train_mixer(
                task,
                mixer,
                steps=count,
                d_model=d_model,
                layers=layers,
                batch_size=batch_size,
                lr=lr if isinstance(lr, float) else lr[task.name],
                seed=seed,
                hidden=hidden,
            )
            seconds = time.perf_counter() - begun
            found.append(_measured(model, task, name, seconds, count * batch_size))
    return found


def _measured(model: SequenceModel, task: Task, name: str, seconds: float, samples: int) -> Compared:
    trained, tested = task.train.inputs, task.test.inputs
    lengths = [int(inputs.shape[1]) if isinstance(inputs, Tensor) else 1 for inputs in (trained, tested)]
    bytes_task = task.score is minus_bits
    return Compared(
        mixer=name,
        task=task.name,
        parameters=sum(value.numel() for value in model.parameters()),
        loss=evaluate_loss(model, task, "test"),
        score=bits_per_byte(model, task) if bytes_task else accuracy(model, task),
        by_length={} if bytes_task else accuracy_by_length(model, task),
        tokens_per_second=samples * lengths[0] / seconds,
        state_bytes=model.state_bytes(lengths[1]),
        state_bytes_later=model.state_bytes(2 * lengths[1]),
    )
