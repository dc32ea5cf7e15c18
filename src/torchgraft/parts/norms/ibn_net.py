"""Instance norm on some channels, batch norm on the others: features that ignore appearance beside those that need it.

`Two at Once: Enhancing Learning and Generalization Capacities via IBN-Net <https://arxiv.org/abs/1807.09441>`_ (Pan et
al., 2018): y[:, :h] = InstanceNorm(x[:, :h]), y[:, h:] = BatchNorm(x[:, h:]), h = floor(ratio * C).

Departures: stages are runs of blocks of equal width, since models name them differently. In variant "b" the batch norm
after the stem becomes an instance norm, as in the authors' models.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, fx, nn

from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.engines.normalize import RunningNorm, group_norm, pool
from torchgraft.engines.normalize.mixed import by_moments
from torchgraft.engines.surgery.swap import SwapReport, replace_module
from torchgraft.errors import BadInput, Untraceable

__all__ = ["CARD", "IBN", "residual_stages", "to_ibn"]

CARD = Card(
    key="ibn-net",
    title="IBN-Net",
    seed_id=156,
    authors="Pan et al., 2018",
    reference="https://arxiv.org/abs/1807.09441",
    family="parts/norms",
    kind="part",
    engine=("normalize", "surgery"),
    equation="y[:, :h] = InstanceNorm(x[:, :h]); y[:, h:] = BatchNorm(x[:, h:]); h = floor(ratio * C)",
    entry="IBN",
    capabilities=frozenset(
        {"channels-first", "running-statistics", "scale-invariant", "shift-invariant", "compilable"}
    ),
    declared={"parameters": "2*channels", "replaces": "BatchNorm2d"},
    example={"channels": 6},
    shapes=((2, 6, 4, 4),),
    oracles=(
        "the first half equals nn.InstanceNorm2d, the second nn.BatchNorm2d, in training and in evaluation",
        "the first half does not change under x -> a x + b, a > 0, a sample and channel; the second does",
        "variant a changes neither shapes nor the number of parameters, and carries gains, offsets and statistics over",
        "ratio 0 is batch norm, ratio 1 instance norm, and after variant a with ratio 0 the model computes the same",
        "variant b normalises the sum of the last block of the first two stages, and the stem",
    ),
    claim=Claim(
        text="A residual network of three stages on digits of 16 x 16 pixels with batch norm, with IBN-a and with "
        "instance norm in place of every batch norm, tested on unseen appearance: contrast x 0.4, brightness + 0.4, "
        "inverted gain, a background gradient.",
        figure="IBN-a at least 5 points above batch norm on the mean of the four shifts, at most 0.7 points below it "
        "on clean digits; instance norm everywhere at least 0.5 points below IBN-a on clean digits",
    ),
    choose_when="images of other brightness, contrast, style or camera are expected than those of training",
    choose_instead="evonorm or plain batch norm where appearance itself is what is to be told apart",
    bibtex="""@inproceedings{pan2018two,
  title={Two at Once: Enhancing Learning and Generalization Capacities via {IBN}-Net},
  author={Pan, Xingang and Luo, Ping and Shi, Jianping and Tang, Xiaoou},
  booktitle={European Conference on Computer Vision},
  year={2018}
}""",
)


class IBN(RunningNorm):
    """Instance norm on the first ``floor(ratio * C)`` channels, batch norm on the others.

    Args:
        channels: C.
        ratio: the share of channels that get instance norm.
        eps: added to variances.
        momentum: the share of a new batch in the running statistics; ``None`` for the plain average.

    Attributes:
        split: the number of channels with instance norm; code that prunes or merges channels must keep to it.

    Shapes:
        (B, C, h, w) -> (B, C, h, w), h * w >= 4

    Example:
        >>> norm = IBN(4)
        >>> norm(torch.randn(2, 4, 3, 3)).shape, norm.split, norm.running_mean.shape
        (torch.Size([2, 4, 3, 3]), 2, torch.Size([2]))

    Raises:
        BadInput: ``ratio`` is not in [0, 1]; a map has fewer than 4 pixels, whose instance norm would leave little.
    """

    def __init__(self, channels: int, *, ratio: float = 0.5, eps: float = 1e-5, momentum: float | None = 0.1) -> None:
        if not 0 <= ratio <= 1:
            raise BadInput(f"ratio must lie in [0, 1], got {ratio}")
        split = int(ratio * channels)
        super().__init__(
            channels, eps=eps, momentum=momentum, layout="first", ndim=(4,), tracked=max(channels - split, 0)
        )
        self.split = split

    def forward(self, x: Tensor) -> Tensor:
        """Normalise; running statistics of the batch norm move in training."""
        pixels = self.checked(x).shape[2] * x.shape[3]
        if self.split and pixels < 4:
            raise BadInput(f"instance norm needs maps of at least 4 pixels, got {tuple(x.shape)}")
        if self.weight is None or self.bias is None or x.numel() == 0:
            return self.affine(x).to(x.dtype)
        if self.split == 0:
            return self.standardized(x)
        if self.split == self.channels:
            return group_norm(x, self.channels, weight=self.weight, bias=self.bias, eps=self.eps)
        running = None if self.training else (self.running_mean.clone(), self.running_var.clone())
        y, mean, var = by_moments(x, partial(self._scale_and_shift, running), self.weight, self.bias)
        if self.training:
            batch_mean, batch_var = pool(mean[:, self.split :], var[:, self.split :], (0,))
            count = len(x) * pixels
            self.track(mean=batch_mean, var=batch_var * (count / (count - 1)))
        return y

    def _scale_and_shift(
        self, running: tuple[Tensor, Tensor] | None, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what to multiply with and to add, (B, C); the last channels share the moments of the batch."""
        h = self.split
        shared = pool(mean[:, h:], var[:, h:], (0,)) if running is None else running
        centre, spread = (
            torch.cat([own[:, :h], one.to(own.dtype).expand(len(own), -1)], 1)
            for own, one in zip((mean, var), shared, strict=True)
        )
        scale = weight * torch.rsqrt(spread + self.eps)
        return scale, bias - centre * scale

    def extra_repr(self) -> str:
        """Return the settings."""
        return f"{self.channels}, split={self.split}, eps={self.eps}, momentum={self.momentum}"


def residual_stages(model: nn.Module) -> list[list[str]]:
    """Return the names of the residual blocks of ``model`` by stage: runs of blocks of equal width.

    A block is a module with at least two convolutions and two batch norms of its own; its width is that of the last.

    Example:
        >>> from torchgraft.bench.models import ResidualNet
        >>> residual_stages(ResidualNet(widths=(4, 8), depth=2))
        [['blocks.0', 'blocks.1'], ['blocks.2', 'blocks.3']]
    """
    stages: list[list[str]] = []
    before = 0
    for name, module in model.named_modules():
        children = list(module.children())
        norms = [child for child in children if isinstance(child, nn.BatchNorm2d | IBN)]
        if name and len(norms) >= 2 and sum(isinstance(child, nn.Conv2d) for child in children) >= 2:
            last = norms[-1]
            width = last.num_features if isinstance(last, nn.BatchNorm2d) else last.channels
            if width != before:
                stages.append([])
            stages[-1].append(name)
            before = width
    return stages


def _converted(old: nn.Module, name: str, ratio: float) -> IBN:
    if not isinstance(old, nn.BatchNorm2d) or old.running_mean is None or old.weight is None:
        raise BadInput(f"{name!r} is no nn.BatchNorm2d with gains and running statistics, which IBN could take over")
    new = IBN(old.num_features, ratio=ratio, eps=old.eps, momentum=old.momentum).to(old.weight)
    state = {key: value for key, value in old.state_dict().items() if not key.startswith("running")}
    for key in ("running_mean", "running_var"):
        state[key] = old.get_buffer(key)[new.split :]
    new.load_state_dict(state)
    new.requires_grad_(old.weight.requires_grad)
    return new.train(old.training)


def _normalized_sum(block: nn.Module, name: str, channels: int) -> nn.Module:
    """Return ``block`` with an instance norm on its last sum."""
    try:
        traced = fx.symbolic_trace(block)
    except Exception as error:  # tracing may raise anything that the block's forward raises on proxies
        raise Untraceable(f"variant 'b' must find the sum in block {name!r}, whose forward cannot be traced") from error
    added = (operator.add, operator.iadd, torch.add, "add", "add_")
    sums = [node for node in traced.graph.nodes if node.target in added]
    if not sums:
        raise BadInput(f"variant 'b' normalises the residual sum, and block {name!r} adds nothing")
    traced.add_module("instance_norm", nn.InstanceNorm2d(channels, affine=True).to(next(block.parameters())))
    with traced.graph.inserting_after(sums[-1]):
        node = traced.graph.call_module("instance_norm")
    sums[-1].replace_all_uses_with(node)
    node.args = (sums[-1],)
    traced.recompile()
    modes = {key: module.training for key, module in block.named_modules()}
    for key, module in traced.named_modules():  # fx makes containers anew, in training mode
        module.training = modes.get(key, block.training)
    return traced


def to_ibn(
    model: nn.Module,
    variant: Literal["a", "b"] = "a",
    *,
    stages: Sequence[int] | None = None,
    ratio: float = 0.5,
) -> SwapReport:
    """Convert a residual network with batch norms, in place; gains, offsets and running statistics are carried over.

    Variant "a" makes an IBN of the batch norm after the first convolution of every block of the chosen stages. Variant
    "b" puts an instance norm on the residual sum of the last block of the chosen stages, which become ``fx`` graphs,
    and in place of the batch norm of the stem.

    Args:
        model: a model whose blocks :func:`residual_stages` finds.
        variant: "a" or "b".
        stages: which stages; by default the first three ("a") or two ("b"), never the last.
        ratio: the share of channels with instance norm, for "a".

    Example:
        >>> from torchgraft.bench.models import ResidualNet
        >>> to_ibn(ResidualNet(widths=(4, 8), depth=1)).names
        ('blocks.0.bn1',)

    Raises:
        BadInput: there are no such stages, or a norm is none that can be converted.
    """
    if variant not in ("a", "b"):
        raise BadInput(f"variant must be 'a' or 'b', got {variant!r}")
    found = residual_stages(model)
    chosen = range(min(3 if variant == "a" else 2, len(found) - 1)) if stages is None else stages
    if not found or any(not 0 <= stage < len(found) for stage in chosen) or not list(chosen):
        raise BadInput(f"the model has {len(found)} residual stages, of which {list(chosen)} cannot be converted")
    before = sum(value.numel() for value in model.parameters())
    names: list[str] = []
    if variant == "a":
        for block in (block for stage in chosen for block in found[stage]):
            children = model.get_submodule(block).named_children()
            names.append(next(f"{block}.{key}" for key, child in children if isinstance(child, nn.BatchNorm2d | IBN)))
            replace_module(model, names[-1], _converted(model.get_submodule(names[-1]), names[-1], ratio))
    else:
        stem = next(key for key, module in model.named_modules() if isinstance(module, nn.BatchNorm2d))
        for name in [found[stage][-1] for stage in chosen]:
            holder = model.get_submodule(name)
            last = [child for child in holder.children() if isinstance(child, nn.BatchNorm2d)][-1]
            replace_module(model, name, _normalized_sum(holder, name, last.num_features))
            names.append(f"{name}.instance_norm")
        if not any(stem.startswith(f"{block}.") for stage in found for block in stage):
            old = model.get_submodule(stem)
            replace_module(model, stem, _converted(old, stem, 1.0))
            names.append(stem)
    return SwapReport(tuple(names), len(names), before, sum(value.numel() for value in model.parameters()))
