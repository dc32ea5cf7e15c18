"""A gated linear unit with normalised factors that stands where a vision transformer has its attention.

`Activator: GLU Activations as The Core Functions of a Vision Transformer <https://arxiv.org/abs/2405.15953>`_
(Abdullah and Aydin, 2024), on tokens X of width D with W_1, W_2 of D x h and W_3 of h x D:
gate(X) = (LN(GELU(X W_1 + b_1)) * LN(X W_2 + b_2)) W_3 + b_3.

No token sees another: a model of these blocks is a bag of patches, and what must be compared across an image cannot be.

Departures: none; ``shared_norm=False`` gives every place a norm of its own and ``tokens`` adds learned positions, which
the released model has not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.errors import BadInput

__all__ = ["CARD", "ActivatorBlock", "ActivatorViT", "GatedUnit", "token_macs"]

CARD = Card(
    key="activator-glu",
    title="Activator: gated linear units in place of attention",
    seed_id=37,
    authors="Abdullah and Aydin, 2024",
    reference="https://arxiv.org/abs/2405.15953",
    family="parts/linears",
    kind="part",
    engine=("none",),
    equation="gate(X) = (LN(GELU(X W_1 + b_1)) * LN(X W_2 + b_2)) W_3 + b_3",
    entry="GatedUnit",
    capabilities=frozenset({"permutation-equivariant", "linear-time", "compilable"}),
    declared={"parameters": "3 * d_model * hidden + (4 if shared_norm else 6) * hidden + d_model"},
    example={"d_model": 12, "hidden": 10, "shared_norm": True},
    shapes=((2, 5, 12),),
    oracles=(
        "the unit equals the equation written out by hand, its norms shared or apart",
        "d out_i / d x_j is exactly zero for i != j, and a permutation of tokens permutes the output",
        "with W_2 = 0 it is the MLP whose hidden layer is LN(GELU(X W_1 + b_1)), scaled by LN(b_2)",
        "a block without the feed-forward part equals one whose feed-forward output weights are zero",
        "parameters and counted multiply-adds equal the formulas, and grow linearly with the tokens",
    ),
    claim=Claim(
        text="Digits in 2x2 patches (16 tokens), depth 4, width 64, equal parameters: the published model (blocks A, "
        "and B without the feed-forward part; no positions) beside a vision transformer and a mixer of tokens; and "
        "two digits side by side, equal or not, where tokens must be compared.",
        figure="blocks A and B at most 1.5 points of accuracy below the transformer, at fewer MACs; on equality at "
        "most 55 %, while token mixing or attention reaches 60 %",
    ),
    choose_when="a bag of patches decides the task, images are small, and cost must be linear in the number of patches",
    choose_instead="softmax-attention or any mixer wherever patches must be compared, or their places matter",
    bibtex="""@article{abdullah2024activator,
  title={Activator: GLU Activations as The Core Functions of a Vision Transformer},
  author={Abdullah, Abdullah Nazhat and Aydin, Tarkan},
  journal={arXiv preprint arXiv:2405.15953},
  year={2024}
}""",
)


def token_macs(d_model: int, hidden: int, *, ffn: bool) -> int:
    """Return the multiply-adds that one block spends on one token, whatever the number of tokens.

    Example:
        >>> token_macs(64, 128, ffn=True), token_macs(64, 128, ffn=False)
        (40960, 24576)
    """
    return (5 if ffn else 3) * d_model * hidden


def _sizes(sizes: dict[str, int]) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise BadInput(f"{name} must be at least 1, got {value}")


class GatedUnit(nn.Module):
    """The gated unit: two projections up, one of them through a GELU, normalised, multiplied and projected back.

    Args:
        d_model: the width D.
        hidden: the width h of the two factors; default twice the width, as in the paper.
        shared_norm: whether both factors pass through one norm with one scale and shift, as in the released code.

    Shapes:
        (B, T, D) -> (B, T, D)

    Example:
        >>> GatedUnit(8, hidden=16)(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])

    Raises:
        BadInput: a size is below 1.
    """

    def __init__(self, d_model: int, *, hidden: int | None = None, shared_norm: bool = True) -> None:
        super().__init__()
        hidden = 2 * d_model if hidden is None else hidden
        _sizes({"d_model": d_model, "hidden": hidden})
        self.d_model, self.hidden = d_model, hidden
        self.gate = nn.Linear(d_model, hidden)
        self.value = nn.Linear(d_model, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.value_norm = None if shared_norm else nn.LayerNorm(hidden)
        self.out = nn.Linear(hidden, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Transform every token by itself."""
        if x.ndim != 3 or x.shape[-1] != self.d_model:
            raise BadInput(f"x must have shape (B, T, {self.d_model}), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise BadInput(f"x must be floating point, got {x.dtype}")
        u = self.norm(F.gelu(self.gate(x)))  # (B, T, h)
        v = (self.norm if self.value_norm is None else self.value_norm)(self.value(x))
        y: Tensor = self.out(u * v)
        return y


class ActivatorBlock(nn.Module):
    """``x + gate(norm(x))``, then ``x + ffn(norm(x))`` unless ``ffn`` is off.

    Args:
        d_model: the width D.
        hidden: the width of the gate and of the feed-forward part; default twice the width.
        ffn: whether the second, ungated part stands (block A) or not (block B).
        dropout: share of the feed-forward part's activations that are dropped in training; the gate has no dropout.
        shared_norm: whether both parts read through one norm, and both factors of the gate too, as released.

    Shapes:
        (B, T, D) -> (B, T, D)

    Example:
        >>> ActivatorBlock(8, ffn=False)(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])

    Raises:
        BadInput: a size is below 1, or ``dropout`` is not in [0, 1).
    """

    def __init__(
        self,
        d_model: int,
        *,
        hidden: int | None = None,
        ffn: bool = True,
        dropout: float = 0.5,
        shared_norm: bool = True,
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise BadInput(f"dropout must be in [0, 1), got {dropout}")
        self.gated = GatedUnit(d_model, hidden=hidden, shared_norm=shared_norm)
        width = self.gated.hidden
        self.norm = nn.LayerNorm(d_model)
        self.ffn_norm = nn.LayerNorm(d_model) if ffn and not shared_norm else None
        self.ffn: nn.Sequential | None = None
        if ffn:
            drop = (nn.Dropout(dropout), nn.Dropout(dropout))
            self.ffn = nn.Sequential(nn.Linear(d_model, width), nn.GELU(), drop[0], nn.Linear(width, d_model), drop[1])

    def forward(self, x: Tensor) -> Tensor:
        """Add what the parts say to the residual stream."""
        y: Tensor = x + self.gated(self.norm(x))
        if self.ffn is not None:
            y = y + self.ffn((self.norm if self.ffn_norm is None else self.ffn_norm)(y))
        return y


class ActivatorViT(nn.Module):
    """Patches, Activator blocks, the mean over patches, a linear head; defaults of the paper's CIFAR-10 model.

    Args:
        patch: height and width of a patch.
        d_model: the width D.
        depth: number of blocks.
        classes: number of classes.
        channels: colour channels.
        hidden: the width of the gates; default twice ``d_model``.
        ffn: blocks A, or B without the feed-forward part.
        dropout: as for the block.
        shared_norm: as for the block.
        tokens: the number of patches, each with a learned position; default none, as released.

    Shapes:
        (B, channels, h, w) -> (B, classes)

    Example:
        >>> ActivatorViT(2, d_model=16, depth=2, channels=1)(torch.rand(3, 1, 8, 8)).shape
        torch.Size([3, 10])

    Raises:
        BadInput: a size is below 1, or ``dropout`` is not in [0, 1).
    """

    def __init__(
        self,
        patch: int = 4,
        *,
        d_model: int = 256,
        depth: int = 4,
        classes: int = 10,
        channels: int = 3,
        hidden: int | None = None,
        ffn: bool = True,
        dropout: float = 0.5,
        shared_norm: bool = True,
        tokens: int | None = None,
    ) -> None:
        super().__init__()
        _sizes({"patch": patch, "d_model": d_model, "depth": depth, "classes": classes, "channels": channels})
        _sizes({} if tokens is None else {"tokens": tokens})
        self.patch = nn.Conv2d(channels, d_model, patch, stride=patch)
        self.position = None if tokens is None else nn.Parameter(0.3 * torch.randn(1, tokens, d_model))
        self.blocks = nn.ModuleList(
            ActivatorBlock(d_model, hidden=hidden, ffn=ffn, dropout=dropout, shared_norm=shared_norm)
            for _ in range(depth)
        )
        self.head = nn.Linear(d_model, classes)

    def forward(self, image: Tensor) -> Tensor:
        """Return class logits.

        Raises:
            BadInput: the image has another number of channels, is no whole number of patches, or has not ``tokens``.
        """
        size, channels = self.patch.kernel_size[0], self.patch.in_channels
        if image.ndim != 4 or image.shape[1] != channels or image.shape[2] % size or image.shape[3] % size:
            raise BadInput(f"image must have shape (B, {channels}, h, w) in steps of {size}, got {tuple(image.shape)}")
        x = self.patch(image).flatten(2).transpose(1, 2)  # (B, T, D)
        if self.position is not None:
            if self.position.shape[1] != x.shape[1]:
                raise BadInput(f"image must have {self.position.shape[1]} patches, got {x.shape[1]}")
            x = x + self.position
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x.mean(dim=1))
        return logits
