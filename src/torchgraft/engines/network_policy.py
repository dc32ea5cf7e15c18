"""Policies over the layers of a network, and the students that their actions describe.

A :class:`RemovalSpace` holds the blocks that may go, a :class:`ShrinkSpace` the widths that may shrink; each says its
layers as states for a policy to read, and turns a string of actions into edits of the teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchgraft.bench.task import Inputs, Task, call
from torchgraft.bench.training import evaluate, evaluate_loss, train
from torchgraft.engines.allocation import strongest
from torchgraft.engines.depth import LayerPath, Stack, stacks
from torchgraft.engines.distill import Teacher
from torchgraft.engines.policy_gradient import Episode
from torchgraft.engines.sites import ignored
from torchgraft.engines.surgery.edits import Edit
from torchgraft.engines.width import prepare
from torchgraft.errors import BadInput

__all__ = [
    "RATIOS",
    "RemovalPolicy",
    "RemovalSpace",
    "ShrinkPolicy",
    "ShrinkSpace",
    "distilled_score",
    "layer_states",
    "removable",
    "removal",
]

#: What a width may be shrunk to.
RATIOS = tuple(place / 10 for place in range(1, 11))


class RemovalPolicy(nn.Module):
    """A bidirectional LSTM over the layers that says for each, given all, whether it stays.

    Args:
        features: numbers in the state of a layer.
        hidden: width of each direction.

    Shapes:
        states (L, features) -> logits of keeping (L,)
    """

    def __init__(self, features: int, *, hidden: int = 30) -> None:
        super().__init__()
        self.lstm = nn.LSTM(features, hidden, bidirectional=True)
        self.head = nn.Linear(2 * hidden, 1)

    def forward(self, states: Tensor) -> Tensor:
        """Return the logits of keeping each layer."""
        logits: Tensor = self.head(self.lstm(states)[0]).squeeze(-1)
        return logits

    def act(self, states: Tensor, episode: Episode) -> tuple[int, ...]:
        """Draw 1 (keep) or 0 (remove) for every layer."""
        return tuple(episode.decide(self(states)).tolist())


class ShrinkPolicy(nn.Module):
    """An LSTM that goes from layer to layer and chooses a ratio for each, told what it chose before.

    Args:
        features: numbers in the state of a layer.
        choices: how many ratios there are.
        hidden: width.
    """

    def __init__(self, features: int, *, choices: int = len(RATIOS), hidden: int = 30) -> None:
        super().__init__()
        self.choices = choices
        self.cell = nn.LSTMCell(features + choices, hidden)
        self.head = nn.Linear(hidden, choices)

    def act(self, states: Tensor, episode: Episode) -> tuple[int, ...]:
        """Draw the place of a ratio for every layer, in order."""
        before, memory, found = states.new_zeros(self.choices), None, []
        for state in states:
            memory = self.cell(torch.cat([state, before])[None], memory)
            place = int(episode.choose(self.head(memory[0])))
            before = nn.functional.one_hot(torch.tensor(place), self.choices).to(states)
            found.append(place)
        return tuple(found)


def layer_states(model: nn.Module, names: Sequence[str], skips: Sequence[bool]) -> Tensor:
    """Return x_l = (kind, kernel, stride, padding, outputs, skip starts, skip ends) of each layer, about one in size.

    Args:
        model: the model.
        names: of the layers; a block is described by the first convolution or linear layer in it.
        skips: whether a layer stands beside a shortcut, which then starts before and ends after it.

    Shapes:
        (L, 7)
    """
    rows = []
    for name, skip in zip(names, skips, strict=True):
        inside = model.get_submodule(name).modules()
        first: Any = next((m for m in inside if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))), None)
        conv = isinstance(first, nn.modules.conv._ConvNd)
        padding = first.padding[0] if conv and not isinstance(first.padding, str) else 0
        outputs = 0 if first is None else first.out_channels if conv else first.out_features
        kernel, stride = (first.kernel_size[0], first.stride[0]) if conv else (1, 1)
        rows.append([float(conv), kernel / 3, stride / 2, padding, outputs / 64, float(skip), float(skip)])
    return torch.tensor(rows).reshape(len(names), 7)


class RemovalSpace:
    """Students that lack some blocks of the teacher; actions are 1 (keep) and 0 (remove).

    Args:
        teacher: left as it is.
        example: its inputs.
        ignore: globs of module names that must stay as they are.
    """

    def __init__(self, teacher: nn.Module, example: Inputs, ignore: Sequence[str] = ()) -> None:
        self.stacks = removable(teacher, example, ignore)
        self.layers = [block for stack in self.stacks for block in stack.blocks]
        self.states = layer_states(teacher, self.layers, [True] * len(self.layers))

    def sizes(self, actions: Sequence[int]) -> tuple[int, ...]:
        """Return what tells students apart: which blocks stay."""
        _fitting(self.layers, actions)
        return tuple(actions)

    def edits(self, actions: Sequence[int]) -> list[Edit]:
        """Return what makes the student.

        Raises:
            BadInput: a stack would be left with fewer blocks than it needs, or the actions do not fit the layers.
        """
        kept = self.sizes(actions)
        return removal(self.stacks, {name for name, stays in zip(self.layers, kept, strict=True) if not stays})


class ShrinkSpace:
    """Students of smaller widths; actions are places in :data:`RATIOS`, the strongest units by norm are kept.

    Args:
        teacher: left as it is.
        example: its inputs.
        ignore: globs of module names that must stay as they are.
        least_units: fewest units of a width (all of them, where there are fewer).
    """

    def __init__(
        self, teacher: nn.Module, example: Inputs, ignore: Sequence[str] = (), *, least_units: int = 10
    ) -> None:
        self.study = prepare(teacher, example, ignore=ignore, cost="parameters")
        self.layers = list(self.study.groups)
        self.least_units = least_units
        names = [layer.split(":")[0] for layer in self.layers]
        self.states = layer_states(self.study.model, names, [":" in layer for layer in self.layers])
        for row, group in zip(self.states, self.study.groups.values(), strict=True):
            row[4] = group.size / 64

    def sizes(self, actions: Sequence[int]) -> tuple[int, ...]:
        """Return what tells students apart: how many units of each group stay."""
        _fitting(self.layers, actions)
        whole = [group.size for group in self.study.groups.values()]
        return tuple(
            min(size, max(self.least_units, round(RATIOS[place] * size)))
            for size, place in zip(whole, actions, strict=True)
        )

    def edits(self, actions: Sequence[int]) -> list[Edit]:
        """Return what makes the student."""
        groups = self.study.groups
        kept = dict(zip(self.layers, self.sizes(actions), strict=True))
        counts = {name: count for name, count in kept.items() if count < groups[name].size}
        if not counts:
            return []
        squares = {name: value.detach().square() for name, value in self.study.model.named_parameters()}
        scores = {name: self.study.structure.unit_scores(name, squares) for name in counts}
        return [*self.study.prelude, self.study.structure.slice(strongest(scores, counts))]


def _fitting(layers: Sequence[str], actions: Sequence[int]) -> None:
    if len(actions) != len(layers):
        raise BadInput(f"{len(layers)} layers need as many actions, got {len(actions)}")


def removable(model: nn.Module, example: Inputs, ignore: Sequence[str] = ()) -> list[Stack]:
    """Return the stacks from which some block may go and in which nothing is ignored."""
    found = []
    for stack in stacks(model, example):
        held = any(ignored(name, ignore) for name in (stack.name, *stack.blocks))
        if stack.length > stack.least and not held:
            found.append(stack)
    return found


def removal(found: Sequence[Stack], gone: set[str]) -> list[Edit]:
    """Return the edits that remove the blocks ``gone``.

    Raises:
        BadInput: a stack would be left with fewer blocks than it needs.
    """
    paths: dict[str, tuple[int, list[int]]] = {}
    for stack in found:
        stack.check([place for place, block in enumerate(stack.blocks) if block not in gone])
        _, path = paths.setdefault(stack.name, (stack.size, list(range(stack.size))))
        for place, block in enumerate(stack.blocks):
            if block in gone:
                path.remove(stack.first + place)
    return [LayerPath(name=n, size=size, path=tuple(path)) for n, (size, path) in paths.items() if len(path) < size]


def distilled_score(
    task: Task,
    teacher: nn.Module | Teacher,
    *,
    steps: int,
    weight: float = 0.1,
    lr: float | None = None,
    seed: int = 0,
) -> Callable[[nn.Module], float]:
    """Return a function that trains a student for a little and says its mean score on ``task.val``.

    The loss is the task's plus ``weight`` times the mean over samples of the squared distance between logits.

    Args:
        task: training and validation samples.
        teacher: whose logits are followed.
        steps: of training.
        weight: lambda.
        lr: default: the task's.
        seed: of the order of samples.
    """
    guide = (teacher if isinstance(teacher, Teacher) else Teacher(teacher, task)).prepare(steps * task.batch_size)

    positive = float(evaluate(guide.model, task, "val").mean()) > 0

    def loss(model: nn.Module, inputs: Inputs, target: Tensor, rows: Tensor) -> Tensor:
        output = call(model, inputs)
        off = (task.output_logits(output) - guide.logits(inputs, rows)).square()
        return task.loss(output, target) + weight * off.flatten(1).sum(1).mean()

    def score(student: nn.Module) -> float:
        rate = task.learning_rate if lr is None else lr
        train(student, task.train, loss, steps=steps, batch_size=task.batch_size, lr=rate, seed=seed)
        mean = float(evaluate(student, task, "val").mean())
        return mean if positive else 1.0 / max(evaluate_loss(student, task, "val"), 1e-12)

    return score
