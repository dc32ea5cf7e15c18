"""Training under masks that hold at every step, and masks that change on the way: drop and grow, gradual pruning.

Masks sit on the weights (:func:`torchgraft.engines.masks.apply_masks`). After every step of the optimiser the values
under them are set to zero, and its state for a weight that goes is cleared, so that neither momentum nor weight decay
moves what is hidden, and a weight that comes back starts at zero without a past.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize as native

from torchgraft.bench.task import Split, take
from torchgraft.bench.training import Objective
from torchgraft.engines.masks import apply_masks, cubic, keep_global, magnitude, prunable
from torchgraft.engines.sparse_training.report import Step, kept_counts
from torchgraft.errors import BadInput

__all__ = ["DropGrow", "Gradual", "MaskedTraining", "cosine_fraction", "drop_and_grow", "remove_lowest", "train_masked"]

Masks = dict[str, Tensor]


def cosine_fraction(step: int, *, end: int, fraction: float = 0.3) -> float:
    """Return fraction / 2 (1 + cos(pi step / end)), and 0 from ``end`` on: the share of weights that move.

    Example:
        >>> [round(cosine_fraction(step, end=10), 6) for step in (0, 5, 10, 11)]
        [0.3, 0.15, 0.0, 0.0]
    """
    if end < 1 or not 0.0 <= fraction <= 1.0:
        raise BadInput(f"a cosine needs end >= 1 and fraction in [0, 1], got end {end}, fraction {fraction}")
    return fraction / 2 * (1 + math.cos(math.pi * step / end)) if step < end else 0.0


def remove_lowest(scores: Mapping[str, Tensor], masks: Mapping[str, Tensor], count: int) -> Masks:
    """Return ``masks`` without the ``count`` kept weights of the lowest scores, over all layers; later ties go first.

    Example:
        >>> remove_lowest({"w": torch.tensor([3.0, 1.0, 2.0])}, {"w": torch.tensor([True, False, True])}, 1)
        {'w': tensor([ True, False, False])}
    """
    there = sum(int(masks[name].sum()) for name in scores)
    if not 0 <= count <= there:
        raise BadInput(f"count must lie in [0, {there}], the weights that are kept, got {count}")
    sizes = {name: tuple(score.shape) for name, score in scores.items()}
    flat = torch.cat([score.flatten().double() for score in scores.values()])
    shown = torch.cat([masks[name].flatten() for name in scores])
    order = torch.argsort(flat.masked_fill(~shown, -math.inf), descending=True, stable=True)
    kept = torch.zeros_like(shown)
    kept[order[: there - count]] = True
    parts = torch.split(kept, [math.prod(shape) for shape in sizes.values()])
    new = {name: part.reshape(sizes[name]) for name, part in zip(sizes, parts, strict=True)}
    return {name: new[name] if name in new else mask.clone() for name, mask in masks.items()}


def drop_and_grow(
    weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], grow: Mapping[str, Tensor], share: float
) -> Masks:
    """Return masks of the same counts: in each layer, a share of the smallest weights goes, the best of the rest come.

    A weight that has just gone may come back, and then nothing has happened to it.

    Args:
        weights: the weights, by name.
        masks: which of them are there.
        grow: a score for each weight, the largest come.
        share: how much of each layer goes, rounded down.

    Example:
        >>> w, mask = torch.tensor([0.1, 2.0, 0.0]), torch.tensor([True, True, False])
        >>> drop_and_grow({"w": w}, {"w": mask}, {"w": torch.tensor([0.0, 9.0, 1.0])}, 0.5)
        {'w': tensor([False,  True,  True])}
    """
    changed: Masks = {}
    for name, mask in masks.items():
        count = int(share * int(mask.sum()))
        kept = remove_lowest({name: weights[name].detach().abs()}, {name: mask}, count)[name]
        score = grow[name].flatten().double().masked_fill(kept.flatten(), -math.inf)
        new = kept.flatten().clone()
        new[torch.argsort(score, descending=True, stable=True)[:count]] = True
        changed[name] = new.reshape(mask.shape)
    return changed


@dataclass(frozen=True, kw_only=True)
class DropGrow:
    """Every ``every`` steps a cosine share of each layer's smallest weights goes, and as many others come.

    Args:
        end: the step from which masks stay.
        grow: ``"gradient"`` for the largest gradients of the batch (RigL, arXiv 1911.11134): that step moves no weight;
            ``"random"`` for any (SET, arXiv 1707.04780).
        fraction: the share at the first step.
        every: steps of training between two changes.
    """

    end: int
    grow: Literal["random", "gradient"] = "gradient"
    fraction: float = 0.3
    every: int = 100

    def __post_init__(self) -> None:
        if self.grow not in ("random", "gradient"):
            raise BadInput(f"grow must be 'random' or 'gradient', got {self.grow!r}")
        if self.every < 1:
            raise BadInput(f"every must be at least 1, got {self.every}")
        cosine_fraction(0, end=self.end, fraction=self.fraction)

    def due(self, step: int) -> bool:
        """Return whether masks change in (or after) ``step``, counted from 0."""
        period = self.every + (self.grow == "gradient")
        return step < self.end and (step + 1) % period == 0


@dataclass(frozen=True, kw_only=True)
class Gradual:
    """Dense at first, then sparser by the cubic schedule (Zhu and Gupta, arXiv 1710.01878); the smallest weights go.

    Args:
        final: how many weights each layer has at the end, or the density of the whole model, whichever layers give.
        start: the step at which pruning begins.
        end: the step at which it is done.
        every: steps between two prunings.
    """

    final: Mapping[str, int] | float
    start: int
    end: int
    every: int = 10

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end or self.every < 1:
            raise BadInput(
                f"gradual pruning needs 0 <= start < end and every >= 1, got {self.start}, {self.end}, {self.every}"
            )
        if isinstance(self.final, float) and not 0.0 <= self.final <= 1.0:
            raise BadInput(f"final must lie in [0, 1] or be counts, got {self.final}")

    def due(self, step: int) -> bool:
        """Return whether masks change after ``step``, counted from 0."""
        return self.start <= step <= self.end and ((step - self.start) % self.every == 0 or step == self.end)

    def masks(self, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], step: int) -> Masks:
        """Return the masks after ``step``, within those before."""
        if isinstance(self.final, float):
            scores = {n: s.masked_fill(~masks[n], -1.0) for n, s in magnitude(weights).items()}
            target = keep_global(scores, cubic(step, start=self.start, end=self.end, final=1.0 - self.final))
        else:
            gone = cubic(step, start=self.start, end=self.end, final=1.0)
            sizes = {name: mask.numel() for name, mask in masks.items()}
            target = {name: sizes[name] - round(gone * (sizes[name] - self.final[name])) for name in masks}
        left: Masks = {}
        for name, mask in masks.items():
            count = max(0, int(mask.sum()) - target[name])
            left[name] = remove_lowest({name: weights[name].detach().abs()}, {name: mask}, count)[name]
        return left


class MaskedTraining:
    """A model that is trained under masks, by any optimiser over its parameters.

    Args:
        model: the model; it is masked in place.
        optimizer: over the parameters of the model; made before or after, since masking keeps them.
        masks: the weights to begin with, by name of prunable weights; a layer without a mask stays dense.
        change: how masks change on the way; ``None`` leaves them.
        seed: of what grows at random.
        clip: the largest norm of the whole gradient.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        >>> training = MaskedTraining(model, optimizer, {"weight": torch.tensor([[True, False]])})
        >>> for _ in range(3):
        ...     _ = training.step(lambda: model(torch.ones(4, 2)).square().mean())
        >>> model.weight[0, 1].item(), len(training.history)
        (0.0, 3)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        masks: Mapping[str, Tensor],
        *,
        change: DropGrow | Gradual | None = None,
        seed: int = 0,
        clip: float | None = None,
    ) -> None:
        self.model, self.optimizer, self.change, self.clip = model, optimizer, change, clip
        self.masks: Masks = {}
        self.history: list[Step] = []
        self.set_masks(masks)
        if isinstance(change, Gradual) and not isinstance(change.final, float) and set(change.final) != set(masks):
            raise BadInput(f"final must name the masked weights {sorted(masks)}, got {sorted(change.final)}")
        self._generator = torch.Generator().manual_seed(seed)

    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Put ``masks`` on the model; what they hide is cleared with its optimiser state."""
        apply_masks(self.model, masks)
        self.masks.update({name: mask != 0 for name, mask in masks.items()})
        self._kept = {name: int(mask.sum()) for name, mask in self.masks.items()}
        self._raw = {name: self._original(name) for name in self.masks}
        self._parameters = list(self.model.parameters())
        self._clear()
        with torch.no_grad():
            for name, raw in self._raw.items():
                for value in self.optimizer.state.get(raw, {}).values():
                    if isinstance(value, Tensor) and value.shape == raw.shape:
                        value.mul_(self.masks[name])

    def _original(self, name: str) -> Tensor:
        layer = self.model.get_submodule(name.rpartition(".")[0])
        found = getattr(cast(Any, layer).parametrizations.weight, "original", None)
        if not isinstance(found, Tensor):
            raise BadInput(f"{name!r} is made of several parts; masked training needs weights of their own")
        return found

    @torch.no_grad()
    def _clear(self) -> None:
        for name, raw in self._raw.items():
            raw.mul_(self.masks[name])

    def step(self, loss: Callable[[], Tensor]) -> float:
        """Do one step on ``loss()``, which runs the model on a batch, and return its value.

        A step of :class:`DropGrow` by gradients in which masks change moves no weight.
        """
        number = len(self.history)
        due = self.change is not None and self.change.due(number)
        if due and isinstance(self.change, DropGrow) and self.change.grow == "gradient":
            self.history.append(Step(self._kept, dense_gradient=True))
            return self._grow_by_gradient(loss, self.change, number)
        self.optimizer.zero_grad(set_to_none=True)
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self._parameters, self.clip)
        self.optimizer.step()
        self._clear()
        self.history.append(Step(self._kept))
        if due and isinstance(self.change, DropGrow):
            share = cosine_fraction(number, end=self.change.end, fraction=self.change.fraction)
            grow = {n: torch.rand(m.shape, generator=self._generator).to(m.device) for n, m in self.masks.items()}
            self.set_masks(drop_and_grow(self._raw, self.masks, grow, share))
        elif due and isinstance(self.change, Gradual):
            self.set_masks(self.change.masks(self._raw, self.masks, number))
        return float(value.detach())

    def _grow_by_gradient(self, loss: Callable[[], Tensor], change: DropGrow, number: int) -> float:
        with native.cached():  # a made weight is one tensor, here and in the forward pass
            made = prunable(self.model)
            wanted = {name: made[name] for name in self.masks}
            value = loss()
            slopes = torch.autograd.grad(value, list(wanted.values()), allow_unused=True)
        grow = {
            name: torch.zeros_like(weight) if slope is None else slope.abs()
            for (name, weight), slope in zip(wanted.items(), slopes, strict=True)
        }
        share = cosine_fraction(number, end=change.end, fraction=change.fraction)
        self.set_masks(drop_and_grow(self._raw, self.masks, grow, share))
        return float(value.detach())

    @property
    def kept(self) -> dict[str, int]:
        """How many weights each prunable layer has now."""
        return kept_counts(self.model)


def train_masked(
    model: nn.Module,
    split: Split,
    objective: Objective,
    masks: Mapping[str, Tensor],
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    change: DropGrow | Gradual | None = None,
    weight_decay: float = 0.0,
    warmup: float = 0.1,
    clip: float | None = 1.0,
    on_step: Callable[[int, float], None] | None = None,
) -> MaskedTraining:
    """Train ``model`` in place by AdamW on a cosine, under masks, and leave it in eval mode with the masks on.

    Args:
        model: the model.
        split: the samples; every epoch is a fresh permutation that depends on the seed alone.
        objective: what to minimise.
        masks: the weights to begin with; none for dense training.
        steps: steps, those in which masks change included.
        batch_size: samples a step.
        lr: the highest learning rate.
        seed: of the order of the data and of what grows at random.
        change: how masks change on the way.
        weight_decay: on parameters of two dimensions or more.
        warmup: the share of the steps over which the rate rises.
        clip: the largest norm of the whole gradient.
        on_step: called after every step with the number of steps done and the loss.
    """
    if steps < 1 or batch_size < 1 or not lr > 0:
        raise BadInput(f"training needs steps >= 1, batch_size >= 1 and lr > 0, got {steps}, {batch_size}, {lr}")
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, fused=True)
    training = MaskedTraining(model, optimizer, masks, change=change, seed=seed, clip=clip)
    generator = torch.Generator().manual_seed(seed)
    size = min(batch_size, len(split))
    rising, order = max(1, round(warmup * steps)), torch.empty(0, dtype=torch.long)
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for step in range(steps):
            if len(order) < size:
                order = torch.randperm(len(split), generator=generator)
            rows, order = order[:size], order[size:]
            inputs, target = take(split.inputs, rows), split.target[rows]
            falling = 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))
            for group in optimizer.param_groups:
                group["lr"] = lr * ((step + 1) / rising if step < rising else falling)
            loss = training.step(lambda: objective(model, inputs, target, rows))  # noqa: B023  # called at once
            if not math.isfinite(loss):
                raise BadInput(f"the loss became {loss} at step {step + 1}; lower the learning rate")
            if on_step is not None:
                on_step(step + 1, loss)
    model.eval()
    return training
