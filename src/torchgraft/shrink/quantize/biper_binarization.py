"""Make weights binary by a square wave whose gradient is that of the sine of the same period.

`BiPer: Binary Neural Networks using a Periodic Function <https://arxiv.org/abs/2404.01278>`_ (Vargas et al., 2024):
w_b = sign(sin(omega w)), dL/dw = dL/dw_b omega cos(omega w); output alpha_c * conv(a, w_b), alpha learned a channel;
quantisation error QE = E[(sin(omega w) - g w_b)^2], least at g = E|sin(omega w)|.

As a lever of ``fit`` it makes the weights of whole layers binary and leaves activations as they are: weights are stored
in one bit and executed in floating point, so the file shrinks and nothing gets faster. With ``activations=True`` inputs
become signs as well, whose gradient is max(0, 2 - 2 |a / std(a)|), std over a sample's channels and positions, and
``engines.binary.freeze`` executes the layers as int8 or as bits.

Departures:
- A trained layer's weights are brought into the rising quarter wave, |omega w| <= pi/2, a row at a time, so that every
  bit starts as the sign of its weight; alpha starts at mean |w|. (The paper starts from random weights and stage 1.)
- The closed form of QE for Laplace weights is derived here: with t = omega b, E sin^2 = 2 t^2 / (1 + 4 t^2) and
  E|sin| = t coth(pi / 2t) / (1 + t^2).
- Errors of latents on different scales are compared through the share QE / E[v^2] (``relative=True``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from torchgraft.catalogue import Card, Claim
from torchgraft.engines.binary import Estimator, Polynomial, binary_layers, hidden_layers, scaled_rows, sign, to_binary
from torchgraft.engines.binary.procedure import BinaryEdit, BinaryProcedure
from torchgraft.engines.parametrize import Spec
from torchgraft.engines.surgery.edits import apply_edits
from torchgraft.errors import BadInput

__all__ = [
    "CARD",
    "BiPer",
    "BiPerEdit",
    "BiPerEstimator",
    "BiPerWeight",
    "NormalisedSign",
    "binarize",
    "laplace_error",
    "omega_for",
    "quantization_error",
    "set_stage",
]

CARD = Card(
    key="biper-binarization",
    title="Binary weights by a periodic function (BiPer)",
    seed_id=163,
    authors="Vargas et al., 2024",
    reference="https://arxiv.org/abs/2404.01278",
    family="shrink/quantize",
    kind="procedure",
    engine=("parametrize", "surgery"),
    equation="w_b = sign(sin(omega w)), dL/dw = dL/dw_b omega cos(omega w), y = alpha_c conv(x, w_b)",
    entry="BiPer",
    stage="weights",
    conflicts={"quantized-distillation": "weights that are bits have no points left to be learned"},
    capabilities=frozenset({"needs-data"}),
    example={"samples": 8},
    oracles=(
        "the gradient is omega cos(omega w) times the upstream one, exactly; values are +1 and -1, +1 where sin = 0",
        "Monte-Carlo QE of Laplace samples lies within 3 standard errors of the closed form at t = 0.3, 0.5, 1, 10",
        "w and w + 2 pi / omega give one bit",
        "a binarised trained layer has the signs of its weights and is the nearest scale times signs a row",
        "saved in eval mode a layer takes one bit a weight and loads bit for bit; in training mode latents are kept",
    ),
    claim=Claim(
        text="digits CNN of three binary convolutions (1-bit weights and activations), 40 epochs of stage 1 and 20 of"
        " stage 2, against 60 epochs of the straight-through sign, learning rate of each chosen on a seed outside the"
        " claim; test accuracy, and quantisation error as a share of the energy of what is made binary",
        figure="accuracy >= straight-through + 0.3 point and error <= straight-through's; mean of 5 seeds",
    ),
    choose_when="the file must shrink by far more than int8 can, layers are wide, and there is time to train",
    choose_instead="int8-dynamic without training or where latency counts; reste-estimator to train signs from scratch",
    bibtex="""@inproceedings{vargas2024biper,
  title={BiPer: Binary Neural Networks using a Periodic Function},
  author={Vargas, Edwin and Correa, Claudia V. and Hinojosa, Carlos and Arguello, Henry},
  booktitle={Conference on Computer Vision and Pattern Recognition},
  year={2024}
}""",
)

#: Added to a sample's variance before its root, as in the released code.
_LEAST_VARIANCE = 1e-5


class BiPerEstimator(Estimator):
    """The square wave with the gradient of the sine.

    Args:
        omega: its frequency.
        stage: 1 gives sin(omega w) itself, 2 its sign.

    Example:
        >>> w = torch.tensor([0.0, 0.2], requires_grad=True)
        >>> BiPerEstimator(20.0)(w).tolist()
        [1.0, -1.0]

    Raises:
        BadInput: omega is not positive, or stage is neither 1 nor 2.
    """

    def __init__(self, omega: float = 20.0, *, stage: int = 2) -> None:
        if not omega > 0 or stage not in (1, 2):
            raise BadInput(f"BiPer needs omega > 0 and stage 1 or 2, got omega {omega}, stage {stage}")
        self.omega = omega
        self.stage = stage

    def surrogate(self, z: Tensor) -> Tensor:
        """Return sin(omega z)."""
        return (self.omega * z).sin()

    def binary(self, z: Tensor) -> Tensor:
        """Return the square wave, or the sine in stage 1."""
        wave = self.surrogate(z)
        return sign(wave) if self.stage == 2 else wave

    def slope(self, z: Tensor) -> Tensor:
        """Return omega cos(omega z)."""
        return self.omega * (self.omega * z).cos()

    def start(self, dense: Tensor) -> Tensor:
        """Return the weights, each row scaled so that its largest lies where the sine is 1."""
        return scaled_rows(dense, math.pi / (2 * self.omega))

    def latent(self, signs: Tensor) -> Tensor:
        """Return the latents halfway up the wave, where the slope is omega / sqrt(2)."""
        return signs * (math.pi / (4 * self.omega))


@dataclass(frozen=True)
class BiPerWeight(Spec):
    """The square wave as a parametrisation: ``torchgraft.parametrize(layer, BiPerWeight(20))``; fold makes it plain.

    Args:
        omega: its frequency.
        stage: 1 gives sin(omega w), 2 its sign with the sine's gradient.

    Example:
        >>> from torchgraft.engines.parametrize import parametrize
        >>> layer = parametrize(nn.Linear(3, 2), BiPerWeight(20.0))
        >>> layer.weight.abs().unique().tolist()
        [1.0]
    """

    omega: float = 20.0
    stage: int = 2

    def start(self, dense: Tensor) -> tuple[Tensor, ...]:
        """Return the latents, which are the weights."""
        return (dense.detach(),)

    def weight(self, parts: tuple[Tensor, ...], constants: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
        """Return sign(sin(omega w)), or sin(omega w) in stage 1."""
        return BiPerEstimator(self.omega, stage=self.stage)(parts[0])


class NormalisedSign:
    """sign(a / std(a)), each sample by its own deviation: the polynomial gradient sees activations of unit spread.

    What a sample's gradient is does not depend on the others of its batch.

    Shapes:
        (B, ...) -> (B, ...); a vector counts as one sample

    Example:
        >>> NormalisedSign()(torch.tensor([-3.0, 0.0, 1.0]))
        tensor([-1.,  1.,  1.])
    """

    def __call__(self, a: Tensor) -> Tensor:
        """Return the signs of ``a``."""
        if not torch.is_grad_enabled():
            return sign(a)
        axes = tuple(range(1, a.ndim)) or (0,)
        if math.prod(a.shape[axis] for axis in axes) < 2:  # a single value has no deviation
            return Polynomial()(a)
        return Polynomial()(a * torch.rsqrt(a.var(axes, keepdim=True) + _LEAST_VARIANCE))


class BiPerEdit(BinaryEdit):
    """Make the layers ``modules`` binary.

    Args:
        modules: dotted names of plain linear layers and 2-d convolutions.
        omega: the frequency.
        activations: whether their inputs become signs too.
        stage: 1 for the sine, 2 for its sign.
    """

    op: ClassVar[str] = "biper"
    omega: float
    stage: int = 2

    def build(self, old: nn.Module) -> nn.Module:
        """Return the binary layer in place of ``old``."""
        estimator = BiPerEstimator(self.omega, stage=self.stage)
        activation = NormalisedSign() if self.activations else None
        return to_binary(old, estimator=estimator, activation=activation, packs=self.stage == 2)


def binarize(
    model: nn.Module, omega: float = 20.0, *, activations: bool = True, stage: int = 2, ignore: Sequence[str] = ()
) -> nn.Module:
    """Return a copy of ``model`` whose hidden linear layers and convolutions are binary; the first and last stay.

    Args:
        model: the model; left as it was.
        omega: the frequency.
        activations: whether inputs of these layers become signs too.
        stage: 1 trains sines, and :func:`set_stage` goes on to 2, their signs.
        ignore: globs of module names that stay.

    Example:
        >>> layers = [nn.Linear(4, 4) for _ in range(3)]
        >>> binarize(nn.Sequential(*layers), activations=False)[1].signs().abs().unique().tolist()
        [1.0]

    Raises:
        BadInput: there is no such layer, or a setting is out of range.
    """
    names = tuple(hidden_layers(model, ignore=ignore))
    if not names:
        raise BadInput(f"{type(model).__name__} has no linear layer or convolution between its first and its last")
    return apply_edits(model, [BiPerEdit(modules=names, omega=omega, activations=activations, stage=stage)])


def set_stage(model: nn.Module, stage: int) -> nn.Module:
    """Set the stage of every BiPer layer of ``model`` in place and return it; bits are packed in stage 2 alone."""
    for layer in binary_layers(model).values():
        if isinstance(layer.estimator, BiPerEstimator):
            layer.estimator = BiPerEstimator(layer.estimator.omega, stage=stage)
            layer.packs = stage == 2
            layer.train(layer.training)
    return model


def quantization_error(model: nn.Module, *, relative: bool = False) -> float:
    """Return min_g E[(v - g sign(v))^2] = E[v^2] - E[|v|]^2, v being what is made binary, averaged over layers.

    v is sin(omega w) in BiPer's layers, and the latent itself elsewhere.

    Args:
        model: a model with binary layers.
        relative: as a share of E[v^2], which does not depend on the scale of v.

    Raises:
        BadInput: the model has no binary layer.
    """
    layers = binary_layers(model)
    if not layers:
        raise BadInput(f"{type(model).__name__} has no binary layer")
    errors = []
    for layer in layers.values():
        wave = isinstance(layer.estimator, BiPerEstimator)
        z = layer.weight.detach().double()
        v = layer.estimator.surrogate(z) if wave else z
        energy = float(v.square().mean())
        error = energy - float(v.abs().mean()) ** 2
        errors.append(error / max(energy, 1e-30) if relative else error)
    return sum(errors) / len(errors)


def laplace_error(t: float) -> float:
    """Return QE at the best g for weights w ~ Laplace(b), t being omega b; 1/2 - 4/pi^2 as t grows.

    Example:
        >>> round(laplace_error(0.3), 4), round(laplace_error(10.0), 4)
        (0.0566, 0.0949)
    """
    energy = 2 * t**2 / (1 + 4 * t**2)
    mean = t / math.tanh(math.pi / (2 * t)) / (1 + t**2)
    return energy - mean**2


def omega_for(target_error: float, scale: float) -> float:
    """Return the lowest frequency at which Laplace weights of ``scale`` b have the quantisation error asked for.

    Args:
        target_error: QE at the best g; it grows with omega b from 0 up to 0.103, near omega b = 0.9.
        scale: b, the mean of |w|.

    Example:
        >>> round(omega_for(0.0888, 0.05), 1)
        10.0

    Raises:
        BadInput: no frequency gives that error, or the scale is not positive.
    """
    if not scale > 0:
        raise BadInput(f"scale must be positive, got {scale}")
    low, high = 1e-6, 2.0
    while high - low > 1e-9:  # the error has a single peak there
        left, right = low + (high - low) / 3, high - (high - low) / 3
        low, high = (left, high) if laplace_error(left) < laplace_error(right) else (low, right)
    peak = (low + high) / 2
    if not 0 < target_error <= laplace_error(peak):
        raise BadInput(f"target_error must lie in (0, {laplace_error(peak):.4f}], got {target_error}")
    low, high = 0.0, peak
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if laplace_error(max(middle, 1e-9)) < target_error else (low, middle)
    return high / scale


class BiPer(BinaryProcedure):
    """Binary weights for a share of the hidden layers, which recovery then trains; strength is the share.

    Layers join in the order of how little of the logits each alone changes.

    Args:
        omega: the frequency.
        activations: whether inputs of these layers become signs too.
        samples: training samples on which the order of the layers is judged.

    Example:
        >>> BiPer().omega
        20.0

    Raises:
        BadInput: a setting is out of range.
    """

    card = CARD

    def __init__(self, *, omega: float = 20.0, activations: bool = False, samples: int = 64) -> None:
        super().__init__(activations=activations, samples=samples)
        BiPerEstimator(omega)
        self.omega = omega

    def edit(self, names: tuple[str, ...]) -> BiPerEdit:
        """Return the edit that makes the layers ``names`` binary."""
        return BiPerEdit(modules=names, omega=self.omega, activations=self.activations)
