"""Widths as differentiable choices: drawing two of them, joining their feature maps, and pricing what may come out.

:class:`Relaxation` makes the groups of a traced model such choices. A feature map of which c of C units are kept is the
whole one read through masked weights, so a mixture of widths is a mixture of masks on the weights that read it, and the
model's own code runs unchanged. Where cutting equals masking, certain choices give the output of the sliced model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from torchgraft.bench.task import Inputs, Task
from torchgraft.engines.surgery.slicing import Structure
from torchgraft.engines.width import Study
from torchgraft.errors import BadInput

__all__ = ["Relaxation", "channel_interpolate", "cost_loss", "draw_two", "temperature", "two_halves", "units_of"]


def channel_interpolate(x: Tensor, channels: int) -> Tensor:
    """Return ``x`` with C' channels: output t averages the inputs floor(t C / C') to ceil((t + 1) C / C') - 1.

    Shapes:
        x (B, C, ...) -> (B, C', ...)

    Example:
        >>> channel_interpolate(torch.tensor([[1.0, 3.0, 5.0, 7.0]]), 2)
        tensor([[2., 6.]])
    """
    if x.ndim < 2 or channels < 1:
        raise BadInput(f"x must be (B, C, ...) and channels at least 1, got {tuple(x.shape)} and {channels}")
    before = x.shape[1]
    if before == channels:
        return x
    pool = x.new_zeros(channels, before)
    for t in range(channels):
        first, last = t * before // channels, -(-(t + 1) * before // channels)
        pool[t, first:last] = 1.0 / (last - first)
    return torch.einsum("tc,bc...->bt...", pool, x)


def draw_two(
    logits: Tensor, *, tau: float, allowed: Tensor | None = None, generator: torch.Generator | None = None
) -> tuple[list[int], Tensor]:
    """Return the places of two options (one, where only one is allowed) and their weights, which carry gradients.

    Args:
        logits: a, (K,).
        tau: temperature.
        allowed: bool mask of options that may be drawn; default: all.
        generator: of the noise.
    """
    log_p = torch.log_softmax(logits if allowed is None else logits.masked_fill(~allowed, -math.inf), 0)
    uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
    u = (log_p + (-(-uniform.log()).log()).to(log_p.dtype)) / tau
    possible = int((log_p > -math.inf).sum())
    chances = torch.softmax(u.detach().double(), 0) + 1e-12 * (log_p > -math.inf)  # the second must have a chance
    places = torch.multinomial(chances, min(2, possible), generator=generator)
    return places.tolist(), torch.softmax(u[places], 0)


def cost_loss(expected: Tensor, actual: float, target: float, *, tolerance: float = 0.05) -> Tensor:
    """Return log of the expected cost where the actual one is above the target's band, minus it below, else zero.

    Args:
        expected: the expected cost under the logits, with gradients.
        actual: the cost of the likeliest architecture.
        target: the cost wanted.
        tolerance: half the width of the band as a share of the target.

    Example:
        >>> [round(float(cost_loss(torch.tensor(1.0).exp(), cost, 10.0)), 4) for cost in (12.0, 10.2, 8.0)]
        [1.0, 0.0, -1.0]
    """
    if actual > (1 + tolerance) * target:
        return expected.log()
    return -expected.log() if actual < (1 - tolerance) * target else 0.0 * expected


def temperature(step: int, steps: int) -> float:
    """Return tau, which falls linearly from 5 to 0.1."""
    return 5.0 + (0.1 - 5.0) * step / max(1, steps - 1)


def two_halves(task: Task, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return rows of a batch for the weights and of one for the logits; the two halves of the samples never meet."""
    half = len(task.train) // 2
    if half == 0:
        raise BadInput(f"one half of the samples moves weights, the other logits; got {len(task.train)} sample")
    first = torch.randint(half, (min(size, half),), generator=generator)
    return first, half + torch.randint(len(task.train) - half, (min(size, half),), generator=generator)


def units_of(structure: Structure, group: str, sizes: Mapping[str, Sequence[int]]) -> dict[tuple[str, int], Tensor]:
    """Return which unit of ``group`` each index of a dimension belongs to, -1 for none, by (tensor name, dimension).

    Args:
        structure: what can be cut.
        group: the group.
        sizes: shape of every parameter and buffer, by name.

    Shapes:
        each value: (size of the dimension,)
    """
    size = next(each.size for each in structure.groups if each.name == group)
    found: dict[tuple[str, int], Tensor] = {}
    for bit in range((size - 1).bit_length()):  # which units have this bit set tells one bit of every index's unit
        kept = []
        for flag in (0, 1):
            cut = structure.slice({group: [unit for unit in range(size) if (unit >> bit) & 1 == flag]})
            masks = {}
            for name, dims in cut.tensors.items():
                for dim, runs in dims.items():
                    masks[name, dim] = torch.zeros(sizes[name][dim], dtype=torch.bool)
                    for start, stop in runs:
                        masks[name, dim][start:stop] = True
            kept.append(masks)
        for place, ones in kept[1].items():
            unit = found.setdefault(place, torch.zeros(len(ones), dtype=torch.long))
            unit += (1 << bit) * (ones & (unit >= 0))
            unit[ones & kept[0][place]] = -1
    return found


class Relaxation:
    """The widths of groups of a study as choices.

    Args:
        study: the model, traced and priced; left as it is.
        options: by group, the counts that may be kept, ascending.
        scores: importance of every unit, by group; the best are kept.
    """

    def __init__(self, study: Study, options: Mapping[str, Sequence[int]], scores: Mapping[str, Tensor]) -> None:
        self.options = {name: torch.tensor(list(counts)) for name, counts in options.items()}
        self._ranks: dict[str, Tensor] = {}
        #: parameter -> (dimension along which it reads, unit of each index, group)
        self._readers: dict[str, list[tuple[int, Tensor, str]]] = {}
        #: parameter -> (its whole cost, group -> share that is kept at each option)
        self._shares: dict[str, tuple[float, dict[str, Tensor]]] = {}
        shapes = {name: tuple(value.shape) for name, value in study.model.state_dict().items()}
        reading = _reading_dims(study.model)
        entries = {name: float(study.uses[name]) * value.numel() for name, value in study.model.named_parameters()}
        self._fixed = sum(entries.values())
        for group, counts in self.options.items():
            rank = torch.empty(study.groups[group].size, dtype=torch.long)
            rank[torch.argsort(scores[group], descending=True, stable=True)] = torch.arange(len(rank))
            self._ranks[group] = rank
            for (name, dim), units in units_of(study.structure, group, shapes).items():
                if reading.get(name) == dim:
                    self._readers.setdefault(name, []).append((dim, units, group))
                if entries.get(name, 0.0) == 0.0:
                    continue
                kept = (rank[units.clamp_min(0)][:, None] < counts) | (units < 0)[:, None]  # (indices, K)
                share = kept.double().mean(0)
                shares = self._shares.setdefault(name, (entries[name], {}))[1]
                shares[group] = shares[group] * share if group in shares else share
        self._fixed -= sum(whole for whole, _ in self._shares.values())

    @property
    def read(self) -> set[str]:
        """The groups that some weight reads; masks of others would do nothing."""
        return {group for readers in self._readers.values() for _, _, group in readers}

    def masked(
        self, weights: Mapping[str, Tensor], drawn: Mapping[str, tuple[Sequence[int], Tensor]]
    ) -> dict[str, Tensor]:
        """Return ``weights`` with those that read a group masked by its widths drawn.

        Args:
            weights: parameters by name.
            drawn: by group, the places of the options drawn and their weights.
        """
        masks = {}
        for group, (places, shares) in drawn.items():
            counts = self.options[group][list(places)]
            masks[group] = ((self._ranks[group][:, None] < counts).to(shares.dtype) * shares).sum(1)  # (units,)
        found = dict(weights)
        for name, readers in self._readers.items():
            for dim, units, group in readers:
                if group not in masks:
                    continue
                gate = torch.where(units < 0, 1.0, masks[group][units.clamp_min(0)])
                shape = [-1 if n == dim else 1 for n in range(found[name].ndim)]
                found[name] = found[name] * gate.reshape(shape).to(found[name].dtype)
        return found

    def expected(self, chances: Mapping[str, Tensor]) -> Tensor:
        """Return the expected cost when widths are drawn independently, by probabilities (K,) of each group."""
        total = torch.tensor(self._fixed, dtype=torch.float64)
        for whole, shares in self._shares.values():
            part: Any = whole
            for group, share in shares.items():
                part = part * (chances[group].double() * share).sum()
            total = total + part
        return total

    def cost(self, counts: Mapping[str, int]) -> float:
        """Return the cost when ``counts``, all of them options, are kept."""
        return float(self.expected({g: (self.options[g] == count).double() for g, count in counts.items()}))

    @staticmethod
    def run(model: nn.Module, weights: Mapping[str, Tensor], inputs: Inputs) -> Any:
        """Return what ``model`` says to ``inputs`` with ``weights`` in place of its parameters."""
        if isinstance(inputs, Mapping):
            return functional_call(model, dict(weights), (), dict(inputs))
        return functional_call(model, dict(weights), inputs if isinstance(inputs, tuple) else (inputs,))


def _reading_dims(model: nn.Module) -> dict[str, int]:
    """Return the dimension along which each linear or convolution weight meets its input, by parameter name."""
    found = {}
    for name, module in model.named_modules():
        conv = isinstance(module, nn.modules.conv._ConvNd) and module.groups == 1
        if conv or isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            first = isinstance(module, nn.modules.conv._ConvTransposeNd) or type(module).__name__ == "Conv1D"
            found[f"{name}.weight" if name else "weight"] = 0 if first else 1
    return found
