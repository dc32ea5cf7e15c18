"""Train binary layers with a gradient between the straight-through estimator and the sign's own: a power function.

`Estimator Meets Equilibrium Perspective: A Rectified Straight Through Estimator for Binary Neural Networks Training
<https://arxiv.org/abs/2308.06689>`_ (Wu et al., 2023): forward sign(z); backward dL/dz = dL/dz_b g(z), g being the
slope of f_o(z) = sign(z) |z|^(1/o): g(z) = |z|^((1-o)/o) / o for m < |z| <= t, m^(1/o) / m for |z| <= m, else 0.

Training floats emulates the signs; ``engines.binary.freeze`` executes them as int8 or as bits, with equal integers.

As a lever of ``fit``, :class:`ReSTEBinarization` makes the weights of whole layers binary and trains them while o rises
from 1 to its end; weights are stored in one bit and executed in floating point, so the file shrinks and nothing gets
faster.

Departures:
- :class:`ReSTEBinarization` starts from trained weights: the latents of a row are scaled so that the largest is 1, for
  m and t are sizes of latents that lie around 0 in [-1, 1]; each row has a scale that is learned, from mean |w| on,
  instead of the mean of the tensor, which packed bits do not hold; and activations stay as they are unless asked for.
- mean |W|, the scale of the weights, takes no gradient, so that a latent's gradient is the formula's and nothing else.
- "The gradient's variance rises with o" is a matter of where the weights lie: g rises with o near 0 and falls near 1.
  It holds for weights spread around 0, as trained ones are, and fails for weights that all lie at 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from torchgraft.bench.task import Task
from torchgraft.catalogue import Card, Claim
from torchgraft.engines import binary
from torchgraft.engines.binary import BinaryLayer, Estimator, Straight, binary_layers, scaled_rows, to_binary
from torchgraft.engines.binary.procedure import BinaryEdit, BinaryProcedure
from torchgraft.engines.finetune import finetune
from torchgraft.engines.procedure import check_strength
from torchgraft.engines.surgery.edits import apply_edits
from torchgraft.errors import BadInput, nearest

__all__ = [
    "CARD",
    "BinaryConv2d",
    "BinaryLinear",
    "Indicators",
    "ReSTE",
    "ReSTEBinarization",
    "ReSTEEdit",
    "ReSTESchedule",
    "RowReSTE",
    "estimator_indicators",
    "reste_sign",
    "reste_slope",
]

CARD = Card(
    key="reste-estimator",
    title="Rectified straight-through estimator (ReSTE)",
    seed_id=174,
    authors="Wu et al., 2023",
    reference="https://arxiv.org/abs/2308.06689",
    family="shrink/quantize",
    kind="procedure",
    engine=("parametrize", "surgery"),
    equation="dL/dz = dL/dsign(z) g(z), g = |z|^((1-o)/o) / o for m < |z| <= t, m^(1/o)/m below, 0 above",
    entry="ReSTEBinarization",
    stage="weights",
    conflicts={"quantized-distillation": "weights that are bits have no points left to be learned"},
    capabilities=frozenset({"needs-data", "needs-labels", "needs-training"}),
    example={"samples": 8, "steps": 1},
    oracles=(
        "o = 1 is the straight-through estimator clipped at t, bit for bit",
        "for m < |z| < t the backward equals finite differences of f_o to 1e-4; f_o is odd and continuous, g >= 0",
        "for weights spread evenly over [-1, 1] the estimating error falls and E[g^2] rises strictly with o",
        "a latent's gradient through a layer is the upstream gradient times mean |W| times g",
        "packed and executed on bits the layer gives the same integers",
        "before it trains, a layer of the lever has the signs of its weights and the nearest scale of each row",
    ),
    claim=Claim(
        text="digits CNN of three binary convolutions (1-bit weights and activations), 50 epochs: straight-through,"
        " tanh-annealed, and ReSTE with o_end 2, 3, 5, 10; test accuracy, final estimating error"
        " ||f_o(z) - sign(z)|| and variance of the weights' gradient magnitudes",
        figure="ReSTE(3) >= straight-through + 0.3 point, with lower error and higher variance; accuracy over o_end"
        " (1, 2, 3, 5, 10) is highest within 2 to 5; mean of 3 seeds",
    ),
    choose_when="a network with 1-bit weights is trained, and straight-through gradients stall; or a trained one's file"
    " must shrink by far more than int8 can, and a hundred steps of training are affordable",
    choose_instead="biper-binarization where nothing may be trained before recovery; int8-dynamic where accuracy counts"
    " more",
    bibtex="""@inproceedings{wu2023estimator,
  title={Estimator Meets Equilibrium Perspective: A Rectified Straight Through Estimator for Binary Neural Networks
         Training},
  author={Wu, Xiao-Ming and Zheng, Dian and Liu, Zuhao and Zheng, Wei-Shi},
  booktitle={International Conference on Computer Vision},
  year={2023}
}""",
)


def reste_slope(z: Tensor, o: float, *, t: float = 1.5, m: float = 0.1) -> Tensor:
    """Return g(z), what the gradient is multiplied with.

    Args:
        z: the latents.
        o: 1 is straight-through, infinity the sign itself.
        t: beyond it the gradient is 0.
        m: below it the slope is that of the chord from 0 to f_o(m), which avoids the pole.

    Example:
        >>> reste_slope(torch.tensor([0.0, 0.25, 2.0]), 2.0)
        tensor([3.1623, 1.0000, 0.0000])

    Raises:
        BadInput: ``o`` is below 1, or not 0 < m < t.
    """
    if not (o >= 1 and 0 < m < t):
        raise BadInput(f"ReSTE needs o >= 1 and 0 < m < t, got o {o}, t {t}, m {m}")
    size = z.abs()
    power = size.clamp(min=m).pow((1 - o) / o) / o
    return torch.where(size <= m, torch.full_like(z, m ** (1 / o) / m), power) * (size <= t)


class ReSTE(Estimator):
    """The estimator as an object: ``ReSTE(o)(z)`` is sign(z) with the gradient above.

    Args:
        o: the exponent; :class:`ReSTESchedule` moves it while training.
        t: beyond it the gradient is 0.
        m: below it the slope is constant.

    Example:
        >>> ReSTE(3.0)
        ReSTE(o=3, t=1.5, m=0.1)
    """

    def __init__(self, o: float = 1.0, *, t: float = 1.5, m: float = 0.1) -> None:
        reste_slope(torch.zeros(()), o, t=t, m=m)
        self.o, self.t, self.m = o, t, m

    def slope(self, z: Tensor) -> Tensor:
        """Return g(z)."""
        return reste_slope(z, self.o, t=self.t, m=self.m)

    def surrogate(self, z: Tensor) -> Tensor:
        """Return f_o(z) = sign(z) |z|^(1/o)."""
        return z.sign() * z.abs().pow(1 / self.o)


class RowReSTE(ReSTE):
    """ReSTE for trained weights: the latents of each row start scaled so that the largest is 1.

    Example:
        >>> RowReSTE(3.0).start(torch.tensor([[0.02, -0.04]])).tolist()
        [[0.5, -1.0]]
    """

    def start(self, dense: Tensor) -> Tensor:
        """Return the weights, each row scaled."""
        return scaled_rows(dense, 1.0)

    def latent(self, signs: Tensor) -> Tensor:
        """Return latents half as large as the largest at the start."""
        return 0.5 * signs


def reste_sign(x: Tensor, o: float, *, t: float = 1.5, m: float = 0.1) -> Tensor:
    """Return sign(x), +1 at 0, with ReSTE's gradient.

    Example:
        >>> x = torch.tensor([0.25, -0.05], requires_grad=True)
        >>> reste_sign(x, 2.0).sum().backward()
        >>> x.grad
        tensor([1.0000, 3.1623])
    """
    return ReSTE(o, t=t, m=m)(x)


def _estimator(chosen: str | Estimator, t: float, m: float) -> Estimator:
    """Return an estimator of its own for each place, so that a schedule may move it."""
    if isinstance(chosen, Estimator):
        return chosen
    if chosen not in ("reste", "ste"):
        raise BadInput(f"unknown estimator {chosen!r}{nearest(str(chosen), ['reste', 'ste'])}")
    return ReSTE(t=t, m=m) if chosen == "reste" else Straight(t)


class BinaryLinear(binary.BinaryLinear):
    """A linear layer of sign(W) mean |W| on sign(x), both with ReSTE's gradient.

    Args:
        in_features: width of the input.
        out_features: width of the output; by default that of the input.
        bias: whether a bias is added.
        estimator: ``"reste"``, ``"ste"``, or an :class:`~torchgraft.engines.binary.Estimator` for both.
        binary_inputs: whether inputs become signs.
        t, m: ReSTE's.

    Shapes:
        (..., in_features) -> (..., out_features)

    Example:
        >>> BinaryLinear(8, out_features=3)(torch.zeros(2, 8)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        in_features: int,
        *,
        out_features: int | None = None,
        bias: bool = True,
        estimator: str | Estimator = "reste",
        binary_inputs: bool = True,
        t: float = 1.5,
        m: float = 0.1,
    ) -> None:
        super().__init__(
            in_features,
            out_features=out_features,
            bias=bias,
            estimator=_estimator(estimator, t, m),
            activation=_estimator(estimator, t, m) if binary_inputs else None,
            scale="mean",
        )


class BinaryConv2d(binary.BinaryConv2d):
    """A 2-d convolution of sign(W) mean |W| over sign(x), both with ReSTE's gradient; the border counts as +1.

    Args:
        channels: channels of the input.
        out_channels: channels of the output; by default those of the input.
        kernel_size, stride, padding: as in ``nn.Conv2d``.
        bias: whether a bias is added.
        estimator: ``"reste"``, ``"ste"``, or an :class:`~torchgraft.engines.binary.Estimator` for both.
        binary_inputs: whether inputs become signs.
        t, m: ReSTE's.

    Shapes:
        (B, channels, h, w) -> (B, out_channels, h', w')

    Example:
        >>> BinaryConv2d(3, out_channels=2)(torch.zeros(1, 3, 4, 4)).shape
        torch.Size([1, 2, 4, 4])

    Raises:
        BadInput: a size is wrong or the estimator unknown.
    """

    def __init__(
        self,
        channels: int,
        *,
        out_channels: int | None = None,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int = 1,
        bias: bool = True,
        estimator: str | Estimator = "reste",
        binary_inputs: bool = True,
        t: float = 1.5,
        m: float = 0.1,
    ) -> None:
        super().__init__(
            channels,
            out_channels=out_channels,
            kernel_size=kernel_size,
            stride=stride,
            padding=padding,
            bias=bias,
            estimator=_estimator(estimator, t, m),
            activation=_estimator(estimator, t, m) if binary_inputs else None,
            scale="mean",
        )


class ReSTESchedule:
    """o = 1 + (1 - cos(pi r / 2)) (o_end - 1) over the share r of training that is done.

    Args:
        o_end: the exponent at the end.
        epochs: how many epochs (or steps) training takes.

    Example:
        >>> schedule = ReSTESchedule(3.0, epochs=10)
        >>> schedule.o(0), schedule.o(10)
        (1.0, 3.0)

    Raises:
        BadInput: ``o_end`` or ``epochs`` is below 1.
    """

    def __init__(self, o_end: float = 3.0, *, epochs: int) -> None:
        if o_end < 1 or epochs < 1:
            raise BadInput(f"o_end and epochs must be at least 1, got o_end {o_end}, epochs {epochs}")
        self.o_end = o_end
        self.epochs = epochs

    def o(self, epoch: float) -> float:
        """Return the exponent after ``epoch`` epochs."""
        share = min(max(epoch / self.epochs, 0.0), 1.0)
        return round(1 + (1 - math.cos(math.pi * share / 2)) * (self.o_end - 1), 12)

    def step(self, model: nn.Module, epoch: float) -> float:
        """Set the exponent of every ReSTE estimator in the binary layers of ``model``; return it."""
        o = self.o(epoch)
        for layer in binary_layers(model).values():
            for estimator in (layer.estimator, layer.activation):
                if isinstance(estimator, ReSTE):
                    estimator.o = o
        return o


@dataclass(frozen=True)
class Indicators:
    """How an estimator stands between its two aims, in one layer.

    Args:
        error: ||f_o(z) - sign(z)|| over the weights; small means that the gradient belongs to what is computed.
        variance: variance of the magnitudes of the weights' gradients; small means that training is stable. ``None``
            where no gradient has been computed.
    """

    error: float
    variance: float | None


def estimator_indicators(model: nn.Module) -> dict[str, Indicators]:
    """Return the indicators of each binary layer of ``model`` at its present weights and gradients.

    Example:
        >>> found = estimator_indicators(nn.Sequential(BinaryLinear(2)))
        >>> found["0"].variance is None
        True

    Raises:
        BadInput: the model has no binary layer.
    """
    layers = binary_layers(model)
    if not layers:
        raise BadInput(f"{type(model).__name__} has no binary layer")
    return {name: _indicators(layer) for name, layer in layers.items()}


def _indicators(layer: BinaryLayer) -> Indicators:
    z = layer.weight.detach()
    gradient = layer.weight.grad
    variance = None if gradient is None else float(gradient.abs().double().var(unbiased=False))
    error = (layer.estimator.surrogate(z) - layer.estimator.binary(z)).double().norm()
    return Indicators(float(error), variance)


class ReSTEEdit(BinaryEdit):
    """Make the layers ``modules`` binary, with ReSTE's gradient.

    Args:
        modules: dotted names of plain linear layers and 2-d convolutions.
        o: the exponent at the end of training.
        t: beyond it the gradient is 0.
        m: below it the slope is constant.
        activations: whether their inputs become signs too.
    """

    op: ClassVar[str] = "reste"
    o: float
    t: float = 1.5
    m: float = 0.1

    def build(self, old: nn.Module) -> nn.Module:
        """Return the binary layer in place of ``old``."""
        activation = ReSTE(self.o, t=self.t, m=self.m) if self.activations else None
        return to_binary(old, estimator=RowReSTE(self.o, t=self.t, m=self.m), activation=activation, packs=True)


class ReSTEBinarization(BinaryProcedure):
    """Binary weights for a share of the hidden layers, trained while the exponent rises; strength is the share.

    Layers join in the order of how little of the logits each alone changes. Recovery goes on at the last exponent.

    Args:
        o_end: the exponent at the end.
        t: beyond it the gradient is 0.
        m: below it the slope is constant.
        steps: training steps over which the exponent rises from 1; with 0 nothing is trained.
        lr: the highest learning rate; default: the task's.
        activations: whether inputs of these layers become signs too.
        samples: training samples on which the order of the layers is judged.

    Example:
        >>> ReSTEBinarization().edit(("fc",)).o
        3.0

    Raises:
        BadInput: a setting is out of range.
    """

    card = CARD
    expense = 3

    def __init__(
        self,
        *,
        o_end: float = 3.0,
        t: float = 1.5,
        m: float = 0.1,
        steps: int = 100,
        lr: float | None = None,
        activations: bool = False,
        samples: int = 64,
    ) -> None:
        super().__init__(activations=activations, samples=samples)
        ReSTE(o_end, t=t, m=m)
        if steps < 0:
            raise BadInput(f"steps must not be negative, got {steps}")
        self.o_end, self.t, self.m, self.steps, self.lr = o_end, t, m, steps, lr

    def edit(self, names: tuple[str, ...]) -> ReSTEEdit:
        """Return the edit that makes the layers ``names`` binary."""
        return ReSTEEdit(modules=names, o=self.o_end, t=self.t, m=self.m, activations=self.activations)

    def apply(
        self, model: nn.Module, task: Task, strength: float, *, ignore: Sequence[str] = (), seed: int = 0
    ) -> nn.Module:
        """Return a copy of ``model`` with binary layers, trained. See :meth:`Procedure.apply`."""
        if not self.steps or check_strength(strength) == 0.0 or not self.applies_to(model, task, ignore=ignore):
            return super().apply(model, task, strength, ignore=ignore, seed=seed)
        schedule = ReSTESchedule(self.o_end, epochs=self.steps)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            made = apply_edits(model, self.plan(model, task, strength, ignore=ignore, seed=seed))
            schedule.step(made, 0)

            def rise(step: int, loss: float) -> None:
                schedule.step(made, step)

            finetune(made, task, steps=self.steps, lr=self.lr, seed=seed, ignore=ignore, on_step=rise)
        return made
