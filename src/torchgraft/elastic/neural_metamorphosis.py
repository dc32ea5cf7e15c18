"""Weights of a network of any width from functions of where a weight stands, trained over many widths at once.

`Neural Metamorphosis <https://arxiv.org/abs/2410.11878>`_ (Yang and Wang, 2024).

Equation: ``W[o, i] = F(gamma(v)), v = (l, i, o, L, C_in, C_out) / N, gamma(v) = [v, sin(2^k pi v), cos(2^k pi v)]``.

Departures: only tensors whose shape depends on the width are generated, a function each; the others stay the
teacher's. The path through the units is greedy and 2-opt where the release solves it by a dedicated solver. Batch norms
must be folded first.

It is no procedure of ``fit --elastic``: every width has tensors of its own, and to generate those of a residual network
of 700 thousand parameters takes longer than a switch may (2 s with the paper's functions, a training step 12 s, on one
core), so a model of several budgets would be several networks that a search has no time to train.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from torchgraft.bench.task import Inputs, Task
from torchgraft.bench.training import train
from torchgraft.catalogue import Card, Claim
from torchgraft.engines.nesting.smooth import Smoothed, permute_smooth
from torchgraft.errors import BadInput

__all__ = ["CARD", "Field", "NeuMeta", "Smoothed", "permute_smooth"]

CARD = Card(
    key="neural-metamorphosis",
    title="Neural metamorphosis",
    seed_id=265,
    authors="Yang and Wang, 2024",
    reference="https://arxiv.org/abs/2410.11878",
    family="elastic",
    kind="tool",
    engine=("nesting", "parametrize"),
    equation="W[o, i] = F(gamma(v)), v = (l, i, o, L, C_in, C_out) / N, gamma(v) = [v, sin(2^k pi v), cos(2^k pi v)]",
    entry="NeuMeta",
    capabilities=frozenset({"elastic", "needs-data", "needs-labels", "needs-training"}),
    oracles=(
        "smoothing leaves the function as it is and never raises the total variation",
        "a generated network is an ordinary module with the same tensors, and gradients reach the functions through it",
        "coordinates depend on layer, place and width alone: two samples without noise are equal bit for bit",
        "on few cities the path is at most a tenth above the shortest, and never longer than as they stand",
    ),
    claim=Claim(
        text="Convolutional network on digits, hidden width 16 to 32, widths 12, 20 and 28 never trained; against "
        "networks trained at each width, against the teacher sliced by magnitude, and without smoothing and noise.",
        figure="mean over the unseen widths within 2 points of networks trained alone, width 16 >= 10 points above the "
        "sliced teacher, and smoothing and noise better than neither on average over the unseen widths",
    ),
    choose_when="networks of many widths are wanted from one small set of weights, widths not known beforehand",
    choose_instead="sortednet, which trains faster and switches at no cost, where a few widths are enough",
    bibtex="@inproceedings{yang2024neumeta, title={Neural Metamorphosis}, author={Yang, Xingyi and Wang, Xinchao}, "
    "booktitle={ECCV}, year={2024}}",
)


class Field(nn.Module):
    """A function of coordinates: Fourier features, residual layers with a learned scale, one number a kernel entry.

    Args:
        outputs: numbers a coordinate.
        hidden: width.
        depth: residual layers.
        frequencies: powers of two in the features.

    Shapes:
        (N, 6) -> (N, outputs)
    """

    def __init__(self, outputs: int, *, hidden: int = 256, depth: int = 4, frequencies: int = 16) -> None:
        super().__init__()
        self.frequencies: Tensor
        self.register_buffer("frequencies", math.pi * 2.0 ** torch.arange(frequencies), persistent=False)
        self.first = nn.Linear(6 * (1 + 2 * frequencies), hidden)
        self.layers = nn.ModuleList([nn.Linear(hidden, hidden) for _ in range(depth)])
        self.scales = nn.Parameter(torch.full((depth,), 0.1))
        self.last = nn.Linear(hidden, outputs)

    def forward(self, v: Tensor) -> Tensor:
        """Return the values at the coordinates."""
        turns = (v[:, :, None] * self.frequencies.to(v.dtype)).flatten(1)
        x = self.first(torch.cat([v, turns.sin(), turns.cos()], 1))
        for place, layer in enumerate(self.layers):
            x = self.scales[place] * torch.relu(layer(x)) + x
        out: Tensor = self.last(x)
        return out


def coordinates(layer: int, layers: int, shape: Sequence[int], norm: float, noise: Tensor | None = None) -> Tensor:
    """Return (o * i, 6) places of the kernels of a tensor: layer, in, out, layers, in channels, out channels.

    Args:
        layer: number of the tensor.
        layers: how many there are.
        shape: of the tensor (o, i, ...), or (o,) for a bias.
        norm: what all are divided by.
        noise: (o * i, 6), added before the division.
    """
    outs, ins = shape[0], shape[1] if len(shape) > 1 else 1
    o, i = torch.meshgrid(torch.arange(outs), torch.arange(ins), indexing="ij")
    parts = [torch.full_like(o, layer), i, o, *(torch.full_like(o, each) for each in (layers, ins, outs))]
    v = torch.stack(parts, -1).reshape(-1, 6).to(torch.get_default_dtype())
    return (v if noise is None else v + noise.to(v.dtype)) / norm


class NeuMeta(nn.Module):
    """A family of networks whose weights are functions of place and width.

    Args:
        model_family: ``model_family(width)`` -> the network of that width.
        widths: the least and the greatest width that is trained.
        teacher: a trained network of one of the widths, best in a smooth order (:func:`permute_smooth`).
        teacher_width: its width.
        steps_of: widths are drawn from ``widths[0], widths[0] + steps_of, ...``.
        leave_out: widths that are not trained.
        noise: how far coordinates are moved in training, in units of one index; 0 for none.
        hidden: width of the functions.
        depth: their layers.
        frequencies: powers of two in their features; above the grid's they make the weights rough.

    Example:
        >>> family = lambda width: nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2))
        >>> meta = NeuMeta(family, (4, 8), family(8), 8, hidden=16, frequencies=4)
        >>> meta.sample(6)[0].weight.shape
        torch.Size([6, 3])

    Raises:
        BadInput: a width is below 1, the teacher is none of the family, or a network of it has batch norms.
    """

    def __init__(
        self,
        model_family: Callable[[int], nn.Module],
        widths: tuple[int, int],
        teacher: nn.Module,
        teacher_width: int,
        *,
        steps_of: int = 1,
        leave_out: Sequence[int] = (),
        noise: float = 1.0,
        hidden: int = 256,
        depth: int = 4,
        frequencies: int = 16,
    ) -> None:
        super().__init__()
        if not 1 <= widths[0] <= widths[1] or steps_of < 1 or not noise >= 0:
            raise BadInput(f"widths must rise from 1 on, steps_of be at least 1, got {widths}, {steps_of}, {noise}")
        self.widths = tuple(w for w in range(widths[0], widths[1] + 1, steps_of) if w not in set(leave_out))
        if not self.widths:
            raise BadInput("no width is left to train")
        self.family, self.teacher_width, self.noise = model_family, teacher_width, noise
        shapes = self.shapes(teacher_width)
        wanted = {name: tuple(value.shape) for name, value in teacher.named_parameters()}
        if wanted != shapes:
            raise BadInput(f"the teacher is no network of width {teacher_width} of the family")
        if any(isinstance(part, nn.modules.batchnorm._NormBase) for part in teacher.modules()):
            raise BadInput("fold the batch norms first: running statistics have no coordinates")
        other = self.shapes(widths[0] if widths[0] != teacher_width else teacher_width + 1)
        self.names = tuple(name for name in shapes if shapes[name] != other[name])
        if not self.names:
            raise BadInput("no tensor of the family depends on the width")
        self.norm = float(max(max(shapes[name][:2]) for name in self.names))
        self.fields = nn.ModuleList(
            [
                Field(math.prod(shapes[name][2:]), hidden=hidden, depth=depth, frequencies=frequencies)
                for name in self.names
            ]
        )
        self.scales: list[float] = []
        for place, name in enumerate(self.names):
            self.register_buffer(f"teacher_{place}", dict(teacher.named_parameters())[name].detach().clone())
            self.scales.append(float(self.wanted(place).std()) or 1.0)
        self.rest = nn.ParameterDict(
            {
                name.replace(".", "/"): nn.Parameter(value.detach().clone(), requires_grad=False)
                for name, value in teacher.named_parameters()
                if name not in self.names
            }
        )

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the parameters of the network of ``width``."""
        with torch.device("meta"):
            return {name: tuple(value.shape) for name, value in self.family(width).named_parameters()}

    def wanted(self, place: int) -> Tensor:
        """Return the teacher's tensor that the function number ``place`` generates."""
        found: Tensor = getattr(self, f"teacher_{place}")
        return found

    def tensors(self, width: int, *, noise: float = 0.0) -> dict[str, Tensor]:
        """Return all parameters of the network of ``width``, the generated ones with their gradients.

        Args:
            width: any from 1 on.
            noise: coordinates are moved by up to half of it, in units of one index.
        """
        if width < 1:
            raise BadInput(f"width must be at least 1, got {width}")
        shapes = self.shapes(width)
        found = {name.replace("/", "."): value for name, value in self.rest.items()}
        for place, name in enumerate(self.names):
            shape = shapes[name]
            v = coordinates(place, len(self.names), shape, self.norm)
            if noise:
                v = v + (torch.rand(v.shape) - 0.5) * noise / self.norm
            v = v.to(self.wanted(place))
            # The functions make numbers of size one; the teacher's tensor says how large its entries are.
            found[name] = self.scales[place] * self.fields[place](v).reshape(shape)
        return found

    def forward(self, inputs: Inputs, width: int | None = None, *, noise: float = 0.0) -> Tensor:
        """Run the network of ``width`` (default: the teacher's)."""
        width = self.teacher_width if width is None else width
        skeleton = self._skeleton(width)
        named = dict(inputs) if isinstance(inputs, Mapping) else {}
        given = () if isinstance(inputs, Mapping) else (inputs,) if isinstance(inputs, Tensor) else inputs
        out: Tensor = functional_call(skeleton, self.tensors(width, noise=noise), given, named)
        return out

    def _skeleton(self, width: int) -> nn.Module:
        kept = self.__dict__.setdefault("_skeletons", {})
        if width not in kept:
            with torch.random.fork_rng():
                kept[width] = self.family(width)
        found: nn.Module = kept[width]
        return found.train(self.training)

    def losses(self) -> tuple[Tensor, Tensor]:
        """Return how far the generated teacher is from the teacher (large entries weigh more), and a norm."""
        made = self.tensors(self.teacher_width)
        far = []
        for place, name in enumerate(self.names):
            wanted = self.wanted(place)
            weight = wanted.abs() / wanted.abs().max().clamp_min(1e-12)
            far.append((weight * (made[name] - wanted).square()).mean())
        size = torch.stack([made[name].norm() for name in self.names]).sum()
        return torch.stack(far).mean(), size

    def fit(
        self,
        task: Task,
        *,
        steps: int,
        lr: float = 1e-3,
        reconstruction: float = 1.0,
        regularisation: float = 1e-4,
        decay: float = 0.995,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> list[float]:
        """Train the functions in place, a random width a step, and return the losses; their running average is kept.

        Args:
            task: training samples and loss.
            steps: optimiser steps.
            lr: highest learning rate.
            reconstruction: weight of the distance from the teacher's weights.
            regularisation: weight of the norms of the generated tensors.
            decay: of the running average of the functions.
            batch_size: samples a step; default: the task's.
            seed: makes every random choice.
        """
        generator = torch.Generator().manual_seed(seed)
        average = {name: value.detach().clone() for name, value in self.fields.named_parameters()}

        def objective(model: nn.Module, inputs: Inputs, target: Tensor, rows: Tensor) -> Tensor:
            width = self.widths[int(torch.randint(len(self.widths), (), generator=generator))]
            loss = task.loss(model(inputs, width, noise=self.noise), target)
            far, size = self.losses()
            return loss + reconstruction * far + regularisation * size

        def follow(step: int, loss: float) -> None:
            rate = min(decay, step / (step + 10.0))
            with torch.no_grad():
                for name, value in self.fields.named_parameters():
                    average[name].lerp_(value, 1.0 - rate)

        record = train(
            self,
            task.train,
            objective,
            steps=steps,
            batch_size=task.batch_size if batch_size is None else batch_size,
            lr=lr,
            seed=seed,
            clip=10.0,
            on_step=follow,
        )
        if steps:
            self.fields.load_state_dict(average, strict=False)
        return list(record.losses)

    def sample(self, width: int, *, draws: int = 1, seed: int = 0) -> nn.Module:
        """Return an ordinary network of ``width``: the mean over draws of noisy coordinates, the first without noise.

        Args:
            width: any from 1 on, best in or near the trained range.
            draws: how many sets of weights are averaged.
            seed: makes the noise.
        """
        if draws < 1:
            raise BadInput(f"draws must be at least 1, got {draws}")
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            sets = [self.tensors(width, noise=self.noise if draw else 0.0) for draw in range(draws)]
            made = copy.deepcopy(self._skeleton(width))
            for name, value in made.named_parameters():
                generated = name in self.names
                value.copy_(torch.stack([each[name] for each in sets]).mean(0) if generated else sets[0][name])
        return made.eval()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_skeletons": {}}
