"""Divide every norm of a pre-norm transformer by the root of its depth, so that deep blocks keep contributing.

`The Curse of Depth in Large Language Models <https://arxiv.org/abs/2502.05795>`_ (Sun et al., 2025):
x' = x_l + Attn(LN(x_l) / sqrt(l)), x_{l+1} = x' + FFN(LN(x') / sqrt(l)), l = 1..L.

Departures: none. The final norm is left alone, and no parameter is added. Do not combine it with output projections
that are scaled by 1/sqrt(2L) at the start; train from scratch, or fold the factor before fine-tuning.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.engines.normalize.depth import LayerReport, depth_report
from torchgraft.engines.normalize.placement import (
    find_blocks,
    gain_offset,
    leave_fast_path,
)
from torchgraft.engines.surgery.swap import replace_module
from torchgraft.errors import BadInput

__all__ = [
    "CARD",
    "DepthScaledNorm",
    "LayerReport",
    "apply_layernorm_scaling",
    "depth_report",
    "fold_layernorm_scaling",
    "harmonic",
]

CARD = Card(
    key="layernorm-scaling",
    title="LayerNorm Scaling",
    seed_id=216,
    authors="Sun, Song, Li, Yin, Zheng and Liu, 2025",
    reference="https://arxiv.org/abs/2502.05795",
    family="parts/norms",
    kind="part",
    engine=("normalize", "surgery"),
    equation="x_{l+1} = x_l + M(LN(x_l) / sqrt(l))",
    entry="DepthScaledNorm",
    capabilities=frozenset({"compilable", "batch-independent", "train-eval-equal"}),
    declared={"parameters": "2*d_model"},
    example={"d_model": 16, "layer_index": 3},
    shapes=((3, 5, 16),),
    oracles=(
        "random linear branches: the squared norm after 32 blocks is |x|^2 + d s^2 H_32 within 5 %, without scaling "
        "|x|^2 + 32 d s^2",
        "layer 1 is bit for bit what it was; layer l is the norm over sqrt(l), the bias included",
        "folding 1/sqrt(l) into weight and bias, Gemma's weight offset too, leaves all outputs; no parameter is added",
        "GPT-2, Llama, ViT, torch's and this library's blocks are scaled by their place in the stack",
    ),
    claim=Claim(
        text="A byte transformer of 12 layers and width 64 on the standard library's source, 1200 steps, with and "
        "without scaling: variance of the last over the first layer, loss when one of the last 4 is left out, loss.",
        figure="variance ratio at least 2x lower; loss increase of leaving out one of the last 4 layers at least "
        "doubles; validation loss at most that of pre-norm",
    ),
    choose_when="a deep pre-norm transformer is trained from scratch and its last third could be left out unnoticed",
    choose_instead="peri-ln where activations spike; plain pre-norm for a checkpoint that was trained so",
    bibtex="@article{sun2025curse, title={The Curse of Depth in Large Language Models}, author={Sun, Wenfang and Song, "
    "Xinyuan and Li, Pengxiang and Yin, Lu and Zheng, Yefeng and Liu, Shiwei}, journal={arXiv preprint "
    "arXiv:2502.05795}, year={2025}}",
)


def harmonic(layers: int) -> float:
    """Return H_L = 1 + 1/2 + ... + 1/L.

    Example:
        >>> harmonic(2)
        1.5
    """
    return math.fsum(1.0 / layer for layer in range(1, layers + 1))


class DepthScaledNorm(nn.Module):
    """A norm whose output is divided by sqrt(l).

    Args:
        d_model: the width D of a new layer norm.
        layer_index: l, counted from 1.
        norm: the norm that is scaled, instead of a new one; affine or not.

    Shapes:
        (B, T, D) -> (B, T, D)

    Example:
        >>> norm = DepthScaledNorm(4, layer_index=4)
        >>> x = torch.randn(2, 3, 4)
        >>> torch.equal(norm(x), norm.norm(x) / 2)
        True

    Raises:
        BadInput: a number is below 1.
    """

    def __init__(self, d_model: int, *, layer_index: int = 1, norm: nn.Module | None = None) -> None:
        super().__init__()
        for name, value in (("d_model", d_model), ("layer_index", layer_index)):
            if value < 1:
                raise BadInput(f"{name} must be at least 1, got {value}")
        self.d_model, self.layer_index = d_model, layer_index
        self.norm = nn.LayerNorm(d_model) if norm is None else norm

    def forward(self, x: Tensor) -> Tensor:
        """Normalise and divide."""
        if x.ndim != 3 or x.shape[-1] != self.d_model:
            raise BadInput(f"x must have shape (B, T, {self.d_model}), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise BadInput(f"x must be floating point, got {x.dtype}")
        norm, factor = self.norm, self.layer_index**-0.5
        plain = type(norm) is nn.LayerNorm and norm.weight is not None and not norm._forward_hooks
        if self.layer_index == 1 or not plain:
            y: Tensor = norm(x)
            return y if self.layer_index == 1 else y * factor
        # D products instead of B T D: a pass over all tokens would cost as much as the norm
        weight, bias = cast(Tensor, norm.weight) * factor, cast("Tensor | None", norm.bias)
        shape, eps = cast("list[int]", norm.normalized_shape), cast(float, norm.eps)
        return F.layer_norm(x, shape, weight, None if bias is None else bias * factor, eps)

    def folded(self) -> nn.Module:
        """Return the norm alone, with the factor in its weight and bias, in place; itself where it has no weight."""
        weight, bias = getattr(self.norm, "weight", None), getattr(self.norm, "bias", None)
        if self.layer_index == 1:
            return self.norm
        if not isinstance(weight, Tensor):
            return self
        factor, offset = self.layer_index**-0.5, gain_offset(self.norm)
        with torch.no_grad():
            weight.copy_((weight + offset) * factor - offset)
            if isinstance(bias, Tensor):
                bias.mul_(factor)
        return self.norm

    def extra_repr(self) -> str:
        """Return the depth."""
        return f"layer_index={self.layer_index}"


def _width(norm: nn.Module) -> int:
    weight = getattr(norm, "weight", None)
    if isinstance(weight, Tensor):
        return weight.numel()
    return int(math.prod(norm.normalized_shape))  # type: ignore[arg-type]  # torch's, without an affine part


def apply_layernorm_scaling(model: nn.Module) -> nn.Module:
    """Divide the norms of block l by sqrt(l), in both sublayers of every pre-norm block, in place; return the model.

    Args:
        model: holds pre-norm blocks of a known kind, see :data:`torchgraft.engines.normalize.placement.FORMS`.

    Example:
        >>> from torchgraft.bench.models import VisionTransformer
        >>> model = apply_layernorm_scaling(VisionTransformer(d_model=8, depth=3, num_heads=2))
        >>> model.blocks[2].norm1
        DepthScaledNorm(
          layer_index=3
          (norm): LayerNorm((8,), eps=1e-05, elementwise_affine=True, bias=True)
        )

    Raises:
        BadInput: no block is recognised, one is not pre-norm, or it is scaled already.
    """
    blocks = find_blocks(model)
    for block in blocks:
        if block.placement != "pre":
            raise BadInput(f"{block.name!r} is {block.placement}-norm; the scaling is for pre-norm blocks")
        for layer in block.sublayers:
            if not layer.norm or isinstance(model.get_submodule(layer.norm), nn.Identity):
                raise BadInput(f"{block.name!r} has no norm before {layer.entry!r} that stands by itself")
            if isinstance(model.get_submodule(layer.norm), DepthScaledNorm):
                raise BadInput(f"{layer.norm!r} is scaled already")
    for block in blocks:
        for layer in block.sublayers:
            norm = model.get_submodule(layer.norm)
            replace_module(
                model,
                layer.norm,
                DepthScaledNorm(_width(norm), layer_index=block.index, norm=norm).train(norm.training),
            )
        leave_fast_path(model.get_submodule(block.name))
    return model


def fold_layernorm_scaling(model: nn.Module) -> nn.Module:
    """Put every 1/sqrt(l) into the weight and bias of its norm, in place: the plain architecture with the same outputs.

    A norm without a weight stays scaled.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, DepthScaledNorm):
            replace_module(model, name, module.folded())
    return model
