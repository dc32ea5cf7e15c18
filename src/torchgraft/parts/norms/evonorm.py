"""A norm and its activation as one layer, found by search: the larger of two deviations instead of a clipping at 0.

`Evolving Normalization-Activation Layers <https://arxiv.org/abs/2004.02967>`_ (Liu et al., 2020), with gain and offset:
B0: y = x / max(s_batch, v1 x + s_instance), s the standard deviation; S0: y = x sigmoid(v1 x) / s_group; nothing is
centred. B1, B2, S1 and S2 have other second terms, see :class:`EvoNorm`.

Departures: the running variance is the unbiased one, as in torch's batch norm. The search is the paper's in miniature.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.engines.normalize import RunningNorm, pool
from torchgraft.engines.normalize.discovery import Discovered, Genome, Node, Score, evolve, mutate, random_genome
from torchgraft.engines.normalize.insertion import ACTIVATIONS
from torchgraft.engines.normalize.mixed import AFFINE, Kernel, by_moments
from torchgraft.errors import BadInput, Untraceable, nearest

__all__ = [
    "CARD",
    "Discovered",
    "EvoNorm",
    "Genome",
    "Node",
    "Score",
    "Variant",
    "evolve",
    "fuse_norm_act",
    "mutate",
    "random_genome",
]

CARD = Card(
    key="evonorm",
    title="EvoNorm",
    seed_id=74,
    authors="Liu et al., 2020",
    reference="https://arxiv.org/abs/2004.02967",
    family="parts/norms",
    kind="part",
    engine=("normalize", "surgery"),
    equation="y = x / max(std_batch, v1 x + std_instance) * gamma + beta (B0); x sigmoid(v1 x) / std_group * ... (S0)",
    entry="EvoNorm",
    capabilities=frozenset({"channels-first", "running-statistics", "scale-invariant", "compilable"}),
    declared={
        "parameters": "(3 if variant == 'B0' else 3 if variant == 'S0' else 2) * channels",
        "replaces": "BatchNorm2d",
    },
    example={"channels": 6, "variant": "B0"},
    shapes=((2, 6, 4, 4),),
    oracles=(
        "all six variants equal their equations written out, output and gradients, in training and in evaluation",
        "B0(c x; v1) = B0(x; v1) and S0(c x; v1 / c) = S0(x; v1) for c > 0; a constant added to x changes S2",
        "the S series sees no other sample, and takes the same value in training and in evaluation",
        "B0 with v1 = 0 on samples of less deviation than the batch is x over the deviation of the batch",
        "fusing finds exactly the norms that nothing but an activation reads",
        "random and mutated layers of the search are valid, and both rejections tell sound layers from unsound ones",
    ),
    claim=Claim(
        text="A residual network of three stages (16 to 64 channels) on digits, batches of 64 and of 4: EvoNorm-B0 and "
        "-S0 beside batch norm and group norm, each with ReLU; and how many random layers of the search pass its two "
        "rejections.",
        figure="B0 at most 0.3 points below batch norm at 64; S0 at least group norm at both sizes; S0 at least 1 "
        "point above batch norm at 4; less than 10 % of random layers pass both rejections",
    ),
    choose_when="a convolutional network with norm and activation side by side; the S series for small batches",
    choose_instead="plain batch norm where it is to be folded into the convolutions, layer norm for tokens",
    bibtex="""@inproceedings{liu2020evolving,
  title={Evolving Normalization-Activation Layers},
  author={Liu, Hanxiao and Brock, Andrew and Simonyan, Karen and Le, Quoc V.},
  booktitle={Advances in Neural Information Processing Systems},
  year={2020}
}""",
)

Variant = Literal["B0", "B1", "B2", "S0", "S1", "S2"]


class _Larger(Kernel):
    """y = x / max(s, p x + q) * gain + offset."""

    compiled = "larger"

    def forward(self, x: Tensor, *numbers: Tensor, out: Tensor | None = None) -> Tensor:
        s, p, q, gain, offset = numbers
        ratio = x / torch.maximum((x * p).add_(q), s)
        return torch.mul(ratio, gain, out=out).add_(offset)

    def backward(self, x: Tensor, grad: Tensor, *numbers: Tensor, out: Tensor) -> Sequence[Tensor]:
        s, p, q, gain, _ = numbers
        other = (x * p).add_(q)
        taken = torch.gt(other, s, out=torch.empty_like(x))
        largest = torch.maximum(other, s, out=other)
        ratio = x / largest
        to_gain, to_offset = torch.mul(grad, ratio, out=out).sum(1), grad.sum(1)
        torch.mul(grad, gain, out=out).div_(largest)
        to_largest = ratio.mul_(out).neg_()
        to_all = to_largest.sum(1)
        to_other = to_largest.mul_(taken)
        to_q = to_other.sum(1)
        to_p = torch.mul(to_other, x, out=largest).sum(1)
        out.add_(to_other.mul_(p))
        return to_all - to_q, to_p, to_q, to_gain, to_offset


class _Gated(Kernel):
    """y = x sigmoid(v x) * scale + shift."""

    compiled = "gated"

    def forward(self, x: Tensor, *numbers: Tensor, out: Tensor | None = None) -> Tensor:
        v, scale, shift = numbers
        return torch.mul(x * torch.sigmoid(v * x), scale, out=out).add_(shift)

    def backward(self, x: Tensor, grad: Tensor, *numbers: Tensor, out: Tensor) -> Sequence[Tensor]:
        v, scale, _ = numbers
        gate = torch.mul(v, x).sigmoid_()
        gated = x * gate
        to_scale, to_shift = torch.mul(grad, gated, out=out).sum(1), grad.sum(1)
        bend = gated.addcmul_(gated, gate, value=-1.0)  # x g (1 - g), by which g x changes with v x
        torch.mul(grad, scale, out=out)
        to_v = torch.mul(bend, x).mul_(out).sum(1)
        out.mul_(gate.add_(bend.mul_(v)))
        return to_v, to_scale, to_shift


class _Silu(Kernel):
    """y = x sigmoid(x) * scale + shift."""

    compiled = "silu"

    def forward(self, x: Tensor, *numbers: Tensor, out: Tensor | None = None) -> Tensor:
        scale, shift = numbers
        return torch.mul(F.silu(x), scale, out=out).add_(shift)

    def backward(self, x: Tensor, grad: Tensor, *numbers: Tensor, out: Tensor) -> Sequence[Tensor]:
        sums = torch.mul(grad, F.silu(x), out=out).sum(1), grad.sum(1)
        out.copy_(torch.ops.aten.silu_backward(grad * numbers[0], x))
        return sums


_LARGER, _GATED, _SILU = _Larger(), _Gated(), _Silu()


class EvoNorm(RunningNorm):
    """Normalisation and activation in one layer; put no other activation after it.

    With s the standard deviation and m the root mean square of a channel, over the batch (the running one in
    evaluation), an instance or a group of channels of an instance, before gain and offset:

    - B0: x / max(s_batch, v1 x + s_instance); B1: x / max(s_batch, (x + 1) m_instance);
      B2: x / max(s_batch, m_instance - x);
    - S0: x sigmoid(v1 x) / s_group; S1: x sigmoid(x) / s_group; S2: x sigmoid(x) / m_group.

    Args:
        channels: C.
        variant: which one. The S series needs no batch and has no running statistics that matter.
        groups: of the S series; divides ``channels``.
        eps: added to what is under a root.
        momentum: the share of a new batch in the running variance.
        apply_act: without, only the division by s_batch (B) or by the deviation of the group (S) is left.

    Shapes:
        (B, C, h, w) -> (B, C, h, w)

    Example:
        >>> EvoNorm(4)(torch.randn(2, 4, 3, 3)).shape
        torch.Size([2, 4, 3, 3])

    Raises:
        BadInput: there is no such variant, or ``groups`` does not divide ``channels`` for an S variant.
    """

    def __init__(
        self,
        channels: int,
        *,
        variant: Variant = "B0",
        groups: int = 32,
        eps: float = 1e-5,
        momentum: float = 0.1,
        apply_act: bool = True,
    ) -> None:
        known = list(get_args(Variant))
        if variant not in known:
            raise BadInput(f"variant must be one of {', '.join(known)}, got {variant!r}{nearest(str(variant), known)}")
        batch = variant.startswith("B")
        statistics = ("var",) if batch else ()
        super().__init__(channels, eps=eps, momentum=momentum, layout="first", ndim=(4,), statistics=statistics)
        if not batch and (groups < 1 or channels % groups):
            raise BadInput(f"groups must divide the {channels} channels, got {groups}")
        self.variant, self.groups, self.apply_act = variant, groups, apply_act
        self.v1 = nn.Parameter(torch.ones(channels)) if apply_act and variant in ("B0", "S0") else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise and activate; the running variance of the B series moves in training."""
        if self.checked(x).numel() == 0 or self.weight is None or self.bias is None:
            return self.affine(x).to(x.dtype)
        given = (self.weight, self.bias, *(() if self.v1 is None else (self.v1,)))
        if self.variant.startswith("S"):
            kernel = AFFINE if not self.apply_act else _SILU if self.v1 is None else _GATED
            return by_moments(x, self._by_group, *given, kernel=kernel)[0]
        count = x.numel() // self.channels
        if self.training and count < 2:
            raise BadInput(f"batch statistics need more than one value a channel, got an input of {tuple(x.shape)}")
        recipe = partial(self._by_batch, None if self.training else self.running_var.clone())
        y, mean, var = by_moments(x, recipe, *given, kernel=_LARGER if self.apply_act else AFFINE)
        if self.training:
            self.track(var=pool(mean, var, (0,))[1] * (count / (count - 1)))
        return y

    def _by_batch(
        self, stored: Tensor | None, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, v1: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Return s_batch, slope and offset of the other deviation, gain and offset; or scale and shift."""
        shared = pool(mean, var, (0,))[1] if stored is None else stored.to(var.dtype)[None]
        deviation = torch.sqrt(shared + self.eps)
        if not self.apply_act:
            return weight / deviation, bias[None]
        size = torch.sqrt((var if self.variant == "B0" else var + mean.square()) + self.eps)
        slope = v1 if v1 is not None else size if self.variant == "B1" else size.new_full((1,), -1.0)
        return deviation, slope, size, weight, bias

    def _by_group(
        self, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, v1: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Return scale and shift, and before them the slope in the gate of S0."""
        shape = (len(mean), self.groups, -1)
        mean, var = pool(mean.view(shape), var.view(shape), (2,))  # (B, G, 1)
        inverse = torch.rsqrt((var + mean.square() if self.variant == "S2" else var) + self.eps)
        scale = inverse.expand(-1, -1, self.channels // self.groups).flatten(1) * weight
        return (scale, bias) if v1 is None else (v1, scale, bias)

    def extra_repr(self) -> str:
        """Return the settings."""
        return f"{self.channels}, variant={self.variant!r}, eps={self.eps}"


_FUNCTIONS = (F.relu, F.relu_, torch.relu, torch.relu_, F.silu, F.gelu, F.relu6, F.leaky_relu, F.elu, F.hardswish)
_METHODS = ("relu", "relu_")


def _is_activation(node: fx.Node, model: nn.Module) -> bool:
    if node.op == "call_module":
        return isinstance(model.get_submodule(str(node.target)), ACTIVATIONS)
    return node.target in _FUNCTIONS if node.op == "call_function" else node.target in _METHODS


def fuse_norm_act(model: nn.Module, build: Callable[[int], nn.Module] = EvoNorm) -> fx.GraphModule:
    """Return a copy of ``model`` in which every norm that only an activation reads is one layer with it.

    The new layers start afresh; the copy is an ``fx`` graph with the names of the model for everything else.

    Args:
        model: a model whose forward pass ``torch.fx`` can trace.
        build: takes the number of channels and returns the layer.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        >>> [type(module).__name__ for module in fuse_norm_act(model).children()]
        ['Conv2d', 'EvoNorm']

    Raises:
        BadInput: the model cannot be traced, or has no such pair.
    """
    try:
        traced = fx.symbolic_trace(copy.deepcopy(model))
    except Exception as error:  # tracing may raise anything that the forward pass raises on proxies
        raise Untraceable(f"the forward pass of {type(model).__name__} cannot be traced by torch.fx") from error
    nodes = [node for node in traced.graph.nodes if node.op == "call_module"]
    fused = 0
    for node in nodes:
        norm, calls = traced.get_submodule(str(node.target)), [other for other in nodes if other.target == node.target]
        if not isinstance(norm, nn.BatchNorm2d | nn.GroupNorm) or len(calls) > 1 or len(node.users) != 1:
            continue
        act = next(iter(node.users))
        if not _is_activation(act, traced):
            continue
        channels = norm.num_features if isinstance(norm, nn.BatchNorm2d) else norm.num_channels
        parent, _, leaf = str(node.target).rpartition(".")
        like = next(norm.parameters(), torch.zeros(()))
        setattr(traced.get_submodule(parent), leaf, build(channels).to(like).train(norm.training))
        act.replace_all_uses_with(node)
        traced.graph.erase_node(act)
        fused += 1
    if not fused:
        raise BadInput(f"{type(model).__name__} has no norm that only an activation reads")
    traced.delete_all_unused_submodules()
    traced.recompile()
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in traced.named_modules():  # fx makes containers anew, in training mode
        module.training = modes.get(name, module.training)
    return traced
