"""Fine-tune convolutions with frozen batch norms in one pass: as stable as two passes, at the cost of the fused layer.

`Efficient ConvBN Blocks for Transfer Learning and Beyond <https://arxiv.org/abs/2305.11624>`_ (You et al., 2024):
y = (s w) * x + s (c - mu) + beta with s = gamma / sqrt(v + eps), and w, c, gamma, beta the parameters.

Departures: the conversion changes what the two modules do and not where they stand, so names, state dict and optimiser
stay; a norm that is in training mode works as it did before, so ``model.train()`` is the way back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from torchgraft.bench.task import Inputs
from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.engines.normalize.attach import attached
from torchgraft.engines.normalize.tune import Tuned, kept_bytes, scale_of, tune, tuned_pairs, tuned_parameters, untune
from torchgraft.engines.parametrize import FoldNorms, norm_pairs
from torchgraft.engines.surgery.trace import shell
from torchgraft.errors import BadInput

__all__ = ["CARD", "ConvBN", "ModeReport", "Pair", "TuneMode", "deploy", "mode_report", "tune_mode", "tuned_parameters"]

CARD = Card(
    key="convbn-tune-mode",
    title="Tune mode of ConvBN blocks",
    seed_id=169,
    authors="You, Guo, Zhou, Cao, Wang and Long, 2024",
    reference="https://arxiv.org/abs/2305.11624",
    family="parts/norms",
    kind="part",
    engine=("normalize", "parametrize"),
    equation="y = (s w) * x + s (c - mu) + beta,  s = gamma / sqrt(v + eps)",
    entry="ConvBN",
    capabilities=frozenset({"compilable"}),
    declared={"parameters": "channels*out_channels*kernel_size**dims + 2*out_channels"},
    example={"channels": 5, "out_channels": 6, "dims": 0},
    shapes=((7, 5),),
    oracles=(
        "output and the gradients of input, weight, bias, gain and shift equal those of two passes in eval mode, for "
        "convolutions (strided, grouped, reflected), transposed convolutions and linear layers, 1e-10 in float64",
        "the gradient of the weight is s times that of the fused weight",
        "what is kept for the backward pass is smaller than in two passes by every convolution's output",
        "a norm in training mode gives what it gave, and leaving the mode restores classes and outputs",
    ),
    claim=Claim(
        text="A residual net trained on digits is fine-tuned on digits turned by 90 degrees with frozen statistics, in "
        "eval, tune and deploy form, at learning rates 1e-2 and 1e-1, with gains as they are and scaled by 0.1.",
        figure="tune's losses within 1e-3 of eval's (float64, every step); what is kept for backward at least 25 % "
        "smaller; step time at most eval's; with gains scaled by 0.1 deploy's loss is higher or not finite at 1e-1",
    ),
    choose_when="fine-tuning or attacking a convolutional network whose batch-norm statistics are frozen: the same "
    "numbers in less time and memory",
    choose_instead="torchgraft.fold where nothing is trained any more; plain batch norm where statistics are learned",
    bibtex="@inproceedings{you2024efficient, title={Efficient {ConvBN} Blocks for Transfer Learning and Beyond}, "
    "author={You, Kaichao and Guo, Qin and Zhou, Anchang and Cao, Meng and Wang, Jianmin and Long, Mingsheng}, "
    "booktitle={ICLR}, year={2024}}",
)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class TuneMode:
    """What :func:`tune_mode` returns: the mode is on already; leaving its ``with`` block takes it off again.

    Args:
        model: the converted model.
        pairs: names of layer and norm.
    """

    def __init__(self, model: nn.Module, pairs: tuple[tuple[str, str], ...]) -> None:
        self.model, self.pairs = model, pairs

    def __enter__(self) -> nn.Module:
        return self.model

    def __exit__(self, *_: object) -> None:
        self.undo()

    def undo(self) -> nn.Module:
        """Take the mode off and return the model, whose modules are what they were; their parameters stay."""
        untune(self.model)
        return self.model

    def __repr__(self) -> str:
        return f"TuneMode({len(self.pairs)} pairs)"


def tune_mode(model: nn.Module, example: Inputs | None = None, *, hold: bool = False) -> TuneMode:
    """Let every layer that a frozen batch norm follows do the norm's work too, in place.

    Outputs and all gradients stay what they are; memory and time of a training step fall. A norm that is put back into
    training mode works as before, and so does its layer.

    Args:
        model: holds convolutions, transposed convolutions or linear layers whose only reader is a batch norm in eval
            mode; the rest of the model may be training.
        example: inputs on which it can be traced, to find pairs that are not neighbours in an ``nn.Sequential``.
        hold: whether ``model.train()`` leaves the norms in eval mode.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).eval()
        >>> tune_mode(model)  # for good
        TuneMode(1 pairs)
        >>> import torch
        >>> x = torch.randn(1, 1, 5, 5)
        >>> deploy(model)(x).shape
        torch.Size([1, 2, 3, 3])

    Raises:
        BadInput: there is no such pair.
    """
    named = dict(model.named_modules())
    pairs = tuple(pair for pair in norm_pairs(model, example) if not attached(named[pair[0]], Tuned))
    if not pairs and not tuned_pairs(model):
        how = "" if example is not None else "; give example= to find pairs outside nn.Sequential by a trace"
        waiting = sum(isinstance(m, _NORMS) and m.training for m in named.values())
        also = f"; {waiting} batch norms are in training mode, call .eval() on them first" if waiting else how
        raise BadInput(f"{type(model).__name__} has no layer whose only reader is a batch norm in eval mode{also}")
    for before, after in pairs:
        tune(named[before], named[after], hold=hold)
    return TuneMode(model, pairs)


def deploy(model: nn.Module, example: Inputs | None = None) -> nn.Module:
    """Fuse every pair for good, in place: the norm becomes an identity, and its statistics and affine part are gone.

    Args:
        model: a model in tune mode, or in eval mode.
        example: as for :func:`tune_mode`; not needed for what is in tune mode.
    """
    names = {module: name for name, module in model.named_modules()}
    pairs = [(names[layer], names[norm]) for layer, norm in tuned_pairs(model)]
    untune(model)
    FoldNorms(pairs=tuple(pairs) or tuple(norm_pairs(model, example))).rewrite(model)
    return model


@dataclass(frozen=True)
class Pair:
    """One layer and its norm.

    Args:
        layer: name of the layer.
        norm: name of the norm.
        smallest: smallest |s| of a channel.
        ratio: 1 / s^2 of the median channel: how much further one step moves the effective weight in deploy mode.
        worst: the same of the channel with the smallest |s|.
    """

    layer: str
    norm: str
    smallest: float
    ratio: float
    worst: float


@dataclass(frozen=True)
class ModeReport:
    """What tune mode saves in a model, and what training it deployed would risk.

    Args:
        pairs: every pair.
        eval_bytes: bytes kept for the backward pass in two passes, parameters not counted.
        tune_bytes: the same in tune mode.
    """

    pairs: tuple[Pair, ...]
    eval_bytes: int
    tune_bytes: int

    def __str__(self) -> str:
        worst = max(self.pairs, key=lambda pair: pair.worst)
        return (
            f"{len(self.pairs)} pairs; kept for backward {self.eval_bytes:,} B -> {self.tune_bytes:,} B "
            f"({self.tune_bytes / max(self.eval_bytes, 1):.2f}x); deployed, a step moves {worst.layer!r} up to "
            f"{worst.worst:.3g} times as far"
        )


def mode_report(model: nn.Module, example: Inputs) -> ModeReport:
    """Say what tune mode saves on ``example``, and how far apart its steps and those of deploy mode are.

    Args:
        model: a model in eval mode, in tune mode or not; left as it is.
        example: inputs of the model.

    Raises:
        BadInput: there is no pair.
    """
    twin = shell(model)
    untune(twin)
    two_passes = kept_bytes(twin, example)
    mode = tune_mode(twin, example)
    pairs = []
    for before, after in mode.pairs:
        scale = scale_of(twin.get_submodule(after)).detach().abs().double()
        squares = scale.clamp(min=1e-30) ** -2
        pairs.append(Pair(before, after, float(scale.min()), float(squares.median()), float(squares.max())))
    return ModeReport(tuple(pairs), two_passes, kept_bytes(twin, example))


class ConvBN(nn.Module):
    """A convolution (or linear layer) and a batch norm, in one pass whenever the norm is in eval mode.

    Args:
        channels: C, of the input.
        out_channels: of the output.
        kernel_size: edge of the kernel; odd, so that padding keeps the size.
        stride: of the convolution.
        dims: 1, 2 or 3 for a convolution over that many axes, 0 for a linear layer on (B, C).
        mode: ``"tune"`` for one pass in eval mode, ``"eval"`` for two.

    Shapes:
        (B, C) where dims is 0, (B, C, h), (B, C, h, w) or (B, C, d, h, w) -> the same with ``out_channels``

    Example:
        >>> import torch
        >>> ConvBN(3, out_channels=8, stride=2)(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 8, 4, 4])

    Raises:
        BadInput: a size is below 1, or ``dims`` or ``mode`` is another.
    """

    def __init__(
        self,
        channels: int,
        *,
        out_channels: int = 64,
        kernel_size: int = 3,
        stride: int = 1,
        dims: int = 2,
        mode: Literal["tune", "eval"] = "tune",
    ) -> None:
        super().__init__()
        for name, size in (("channels", channels), ("out_channels", out_channels), ("stride", stride)):
            if size < 1:
                raise BadInput(f"{name} must be at least 1, got {size}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise BadInput(f"kernel_size must be odd and at least 1, got {kernel_size}")
        if dims not in (0, 1, 2, 3) or mode not in ("tune", "eval"):
            raise BadInput(f"dims must be 0 to 3 and mode 'tune' or 'eval', got {dims} and {mode!r}")
        self.channels, self.dims = channels, dims
        self.layer: nn.Module
        if dims == 0:
            self.layer = nn.Linear(channels, out_channels, bias=False)
        else:
            self.layer = _CONVS[dims - 1](
                channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=False
            )
        self.norm = _NORMS[max(dims, 1) - 1](out_channels)
        if mode == "tune":
            tune(self.layer, self.norm)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised output of the layer."""
        if x.ndim != self.dims + 2 or x.shape[1] != self.channels:
            sizes = ", ".join(["B", str(self.channels), *["h", "w", "d"][: self.dims]])
            raise BadInput(f"x must have shape ({sizes}), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise BadInput(f"x must be floating point, got {x.dtype}")
        y: Tensor = self.norm(self.layer(x))
        return y
