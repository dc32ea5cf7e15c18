"""Train with one or two images a step: standardised weights, and batch statistics that are estimated over many steps.

`Micro-Batch Training with Batch-Channel Normalization and Weight Standardization <https://arxiv.org/abs/1903.10520>`_
(Qiao et al., 2019): W'_o = (W_o - mean W_o) / (std W_o + 1e-5); y = GroupNorm(gamma (x - mu) / sqrt(v + eps) + beta)
with mu += s (mean_B x - mu) and v += s (mean_B (x - mu_old)^2 - v), constants for the gradient.

Departures: the standard deviation is the biased one of the paper's equation, not the unbiased one of its code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.engines.normalize import RunningNorm, pool, wide
from torchgraft.engines.normalize.mixed import by_moments
from torchgraft.engines.parametrize import Spec, parametrize, spec_of
from torchgraft.engines.surgery.swap import SwapReport, Where, find, swap
from torchgraft.errors import BadInput

__all__ = ["CARD", "BatchChannelNorm", "Standardized", "micro_batch_ready", "weight_standardize"]

CARD = Card(
    key="weight-standardization-bcn",
    title="Weight standardisation and batch-channel normalisation",
    seed_id=159,
    authors="Qiao et al., 2019",
    reference="https://arxiv.org/abs/1903.10520",
    family="parts/norms",
    kind="part",
    engine=("normalize", "parametrize", "surgery"),
    equation="W'_o = (W_o - mean W_o) / (std W_o + 1e-5); y = GroupNorm(gamma (x - mu) / sqrt(v + eps) + beta)",
    entry="BatchChannelNorm",
    capabilities=frozenset({"channels-first", "running-statistics", "compilable"}),
    declared={"parameters": "2*channels + 2*groups", "replaces": "BatchNorm2d"},
    example={"channels": 6, "groups": 2},
    shapes=((2, 6, 4, 4),),
    oracles=(
        "standardised weights have zero mean and unit deviation; the loss does not see W_o -> a W_o + b, a > 0",
        "the gradient of W_o is orthogonal to ones and to W_o - mean, and no longer than that of W'_o over std W_o",
        "with s = 1 on one batch the estimated statistics are those of batch norm after two updates",
        "with exact statistics output and gradients equal batch norm followed by group norm",
        "folded weights are plain and give the same outputs; conversion keeps gains, offsets and statistics",
    ),
    claim=Claim(
        text="A network of four convolutions of 32 channels on digits, as many samples in batches of 2 as in those of "
        "64: batch norm at 64 and at 2; group norm, group norm with weight standardisation, and batch-channel norm "
        "with it, at 2.",
        figure="batch norm at 2 at least 1.5 points below batch norm at 64; batch-channel norm with weight "
        "standardisation at 2 at least as good as group norm at 2 and at most 0.7 points below batch norm at 64",
    ),
    choose_when="a convolutional network must be trained with one to four images a step",
    choose_instead="plain batch norm with large batches, whose cost can be folded away; layer norm in transformers",
    expected_failures={
        "training-gradients-are-the-derivatives": "estimated statistics move with the input but are constants for the "
        "gradient, as the paper defines them; with estimate=False the gradients are the derivatives"
    },
    bibtex="""@article{qiao2019micro,
  title={Micro-Batch Training with Batch-Channel Normalization and Weight Standardization},
  author={Qiao, Siyuan and Wang, Huiyu and Liu, Chenxi and Shen, Wei and Yuille, Alan},
  journal={arXiv preprint arXiv:1903.10520},
  year={2019}
}""",
)

_Model = TypeVar("_Model", bound=nn.Module)


@dataclass(frozen=True)
class Standardized(Spec):
    """weight = (W - mean) / (std + eps), mean and deviation over all inputs of one output.

    Args:
        eps: added to the standard deviation.

    Example:
        >>> layer = parametrize(nn.Linear(8, 2), Standardized())
        >>> bool(layer.weight.mean(1).abs().max() < 1e-6)
        True
    """

    eps: float = 1e-5

    def start(self, dense: Tensor) -> tuple[Tensor, ...]:
        """Return the dense tensor, which stays what is trained."""
        if dense.ndim < 2 or dense[0].numel() < 2:
            raise BadInput(f"a weight is standardised over at least two inputs, got {tuple(dense.shape)}")
        return (dense.detach(),)

    def weight(self, parts: tuple[Tensor, ...], constants: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
        """Return the standardised weight."""
        rows = wide(parts[0]).flatten(1)  # (O, I)
        centred = rows - rows.mean(1, keepdim=True)
        deviation = torch.linalg.vector_norm(centred, dim=1, keepdim=True) * rows.shape[1] ** -0.5
        made: Tensor = centred / (deviation + self.eps)
        return made.reshape(shape).to(parts[0].dtype)


class BatchChannelNorm(RunningNorm):
    """Batch norm, by running estimates where batches are tiny, and then a normalisation of groups of channels.

    Args:
        channels: C.
        groups: G, each with its own gain and offset; divides C. By default as many of up to 32 as leave 4 channels.
        estimate: whether training normalises by the running estimates, which are moved first; otherwise by the batch.
        eps: added to variances.
        momentum: s, the speed of the estimates; let it fall with the learning rate.

    Shapes:
        (B, C, h, w) -> (B, C, h, w)

    Example:
        >>> BatchChannelNorm(8)(torch.randn(1, 8, 3, 3)).shape
        torch.Size([1, 8, 3, 3])

    Raises:
        BadInput: ``groups`` does not divide ``channels``.
    """

    def __init__(
        self,
        channels: int,
        *,
        groups: int | None = None,
        estimate: bool = True,
        eps: float = 1e-5,
        momentum: float = 0.1,
    ) -> None:
        super().__init__(channels, eps=eps, momentum=momentum, layout="first", ndim=(4,))
        if groups is None:
            most = max(1, min(32, channels // 4))
            groups = next(count for count in range(most, 0, -1) if channels % count == 0)
        if groups < 1 or channels % groups:
            raise BadInput(f"groups must divide the {channels} channels, got {groups}")
        self.groups, self.estimate = groups, estimate
        self.group_weight = nn.Parameter(torch.ones(groups))
        self.group_bias = nn.Parameter(torch.zeros(groups))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise; running statistics move in training."""
        if self.checked(x).numel() == 0 or self.weight is None or self.bias is None:
            return self.affine(x).to(x.dtype)
        count = x.numel() // self.channels
        if self.training and not self.estimate and count < 2:
            raise BadInput(f"batch statistics need more than one value a channel, got an input of {tuple(x.shape)}")
        before = self.running_mean.clone(), self.running_var.clone()
        share = self.counted() if self.training else 0.0
        recipe = partial(self._scale_and_shift, before, share)
        y, mean, var = by_moments(x, recipe, self.weight, self.bias, self.group_weight, self.group_bias)
        if self.training:
            mean, var = pool(mean, var, (0,))
            var = var + (mean - before[0]).square() if self.estimate else var * (count / (count - 1))
            for running, old, new in zip((self.running_mean, self.running_var), before, (mean, var), strict=True):
                running.copy_(_moved(old, new, share))
        return y

    def _scale_and_shift(
        self,
        before: tuple[Tensor, Tensor],
        share: float,
        mean: Tensor,
        var: Tensor,
        weight: Tensor,
        bias: Tensor,
        group_weight: Tensor,
        group_bias: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return what to multiply with and to add, (B, C), as functions of the instance moments."""
        centre, spread = before
        if share and self.estimate:
            batch_mean, batch_var = (value.detach() for value in pool(mean, var, (0,)))
            seen = batch_var + (batch_mean - centre).square()
            centre, spread = _moved(centre, batch_mean, share), _moved(spread, seen, share)
        elif share:
            centre, spread = pool(mean, var, (0,))
        scale = weight * torch.rsqrt(spread.to(mean.dtype) + self.eps)  # of the batch norm, (1, C)
        shift = bias - centre * scale
        grouped = (len(mean), self.groups, -1)
        group_mean, group_var = pool((scale * mean + shift).view(grouped), (scale.square() * var).view(grouped), (2,))
        gain = group_weight[:, None] * torch.rsqrt(group_var + self.eps)  # (B, G, 1)
        offset = group_bias[:, None] - group_mean * gain
        wide_gain, wide_offset = (
            value.expand(-1, -1, self.channels // self.groups).flatten(1) for value in (gain, offset)
        )
        return scale * wide_gain, shift * wide_gain + wide_offset

    def extra_repr(self) -> str:
        """Return the settings."""
        return f"{self.channels}, groups={self.groups}, estimate={self.estimate}, momentum={self.momentum}"


def _moved(old: Tensor, new: Tensor, share: float) -> Tensor:
    """Return old + share * (new - old) in the dtype of the statistics."""
    return old.to(new.dtype) + share * (new.flatten() - old.to(new.dtype))


def weight_standardize(model: _Model, *, where: Where | None = None, eps: float = 1e-5) -> _Model:
    """Standardise weights in place, by parametrisation; ``torchgraft.fold`` makes them plain again.

    The optimiser goes on to train W. Weight decay on it only changes the size of the steps.

    Args:
        model: any module.
        where: which layers; by default convolutions except depthwise ones (whose few inputs make it noisy) and linear
            layers except the last, which needs its scale.
        eps: added to the standard deviation.

    Example:
        >>> weight_standardize(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()))[0].weight.mean().abs().item() < 1e-6
        True

    Raises:
        BadInput: there is no such layer.
    """
    if where is None:
        kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
        layers: dict[str, nn.Module] = {
            name: layer
            for name, layer in model.named_modules()
            if isinstance(layer, kinds) and not (isinstance(layer, kinds[:3]) and 1 < layer.groups == layer.in_channels)
        }
        last = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)][-1:]
        layers = {name: layer for name, layer in layers.items() if name not in last}
    else:
        layers = find(model, where)
    if not layers:
        raise BadInput(f"{type(model).__name__} has no layer whose weights can be standardised")
    for layer in set(layers.values()):
        if not any(isinstance(spec, Standardized) for spec in spec_of(layer)):
            parametrize(layer, Standardized(eps=eps))
    return model


def micro_batch_ready(
    model: nn.Module, *, groups: int | None = None, estimate: bool = True, momentum: float = 0.1
) -> SwapReport:
    """Put batch-channel norms in place of the batch norms of ``model`` and standardise its weights, in place.

    Gains, offsets and running statistics are carried over.

    Args:
        model: a convolutional network.
        groups, estimate, momentum: as in :class:`BatchChannelNorm`.

    Example:
        >>> micro_batch_ready(nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8))).names
        ('1',)

    Raises:
        BadInput: there is no ``nn.BatchNorm2d``, or one without gains and running statistics.
    """

    def build(old: nn.Module, name: str) -> nn.Module:
        if not isinstance(old, nn.BatchNorm2d) or old.running_mean is None or old.weight is None:
            raise BadInput(f"{name!r} is a batch norm without gains or running statistics, which cannot be taken over")
        new = BatchChannelNorm(old.num_features, groups=groups, estimate=estimate, eps=old.eps, momentum=momentum)
        new.load_state_dict(old.state_dict(), strict=False)
        return new.to(old.weight).train(old.training)

    report = swap(model, nn.BatchNorm2d, build)
    weight_standardize(model)
    return report
