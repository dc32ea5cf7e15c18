"""Attention with a gate for each head between what patches hold and where they stand, and it starts as a convolution.

`ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases <https://arxiv.org/abs/2103.10697>`_
(d'Ascoli et al., 2021): A_ij = (1 - s(g_h)) softmax_j(q_i . k_j / sqrt(K)) + s(g_h) softmax_j(v_h . r_ij) with s the
logistic function, r_ij = (dx, dy, dx^2 + dy^2) of the offset from patch i to patch j, and v_h = -a (-2 D_h, 1) at the
start, so that head h looks at offset D_h.

Departures: rows are not divided by their sum, which is 1 already; the position score has no bias, to which softmax is
blind; keys and values may have sizes of their own, because a head needs all channels to be one tap of a convolution.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from torchgraft.catalogue import Card, Claim
from torchgraft.engines.attention import attend, attention_weights
from torchgraft.engines.recurrence.heads import head_size, merge_heads, split_heads
from torchgraft.engines.recurrence.mixer import Mixer
from torchgraft.errors import BadInput
from torchgraft.parts.blocks.vision_model import SelfAttention, VisionModel

__all__ = ["CARD", "GatedPositionalSelfAttention", "convit", "head_offsets"]

CARD = Card(
    key="gated-positional-self-attention",
    title="Gated positional self-attention (ConViT)",
    seed_id=217,
    authors="d'Ascoli et al., 2021",
    reference="https://arxiv.org/abs/2103.10697",
    family="parts/mixers",
    kind="part",
    engine=("attention",),
    equation="A_ij = (1 - s(g_h)) softmax_j(q_i . k_j / sqrt(K)) + s(g_h) softmax_j(v_h . r_ij)",
    entry="GatedPositionalSelfAttention",
    declared={"parameters": "4*d_model**2 + d_model + 4*num_heads"},
    example={"d_model": 16, "num_heads": 4},
    shapes=((2, 12, 16),),
    oracles=(
        "with the gate at 1, strength 46 and nine heads it is Conv2d(3, padding_mode='replicate'), dilated or not",
        "with the gate at 0 it is multi-head self-attention written out",
        "rows of the weights are nonnegative, sum to 1 and are the gated sum of both softmaxes, computed pair by pair; "
        "they mix what the fused and batched products mix",
        "position weights depend on the offset only: interior rows are translates of one another",
        "gates and attention distance by hand on a row of three patches",
    ),
    claim=Claim(
        text="Digits resized to 16x16 as 16 patches, 4 layers of 9 heads (3 of GPSA, the class token joining for the "
        "last), from 10, 30 and 100 % of the training data, beside the same model with plain attention throughout; "
        "learned positions start small (0.02), as in the paper's code.",
        figure="test accuracy at least 5 points above plain attention at 10 % of the data; a smaller lead at 100 %; "
        "the mean gate of the last GPSA layer below that of the first",
    ),
    choose_when="patches of images and little data: it learns like a convolution at first and may leave that behind",
    choose_instead="plain attention with learned positions where data is plentiful or tokens do not lie on a grid",
    bibtex="""@inproceedings{dascoli2021convit,
  title={{ConViT}: Improving Vision Transformers with Soft Convolutional Inductive Biases},
  author={d'Ascoli, St{\\'e}phane and Touvron, Hugo and Leavitt, Matthew L. and Morcos, Ari S. and Biroli, Giulio and
    Sagun, Levent},
  booktitle={International Conference on Machine Learning},
  year={2021}
}""",
)


def _xy(place: Tensor, width: int) -> Tensor:
    return torch.stack([place % width, place // width], dim=-1)


def head_offsets(num_heads: int) -> Tensor:
    """Return D_h, the offset (dx, dy) that each head looks at first: a square around the patch, row by row, (H, 2).

    Example:
        >>> head_offsets(9)[[0, 4, 5]].tolist()
        [[-1.0, -1.0], [0.0, 0.0], [1.0, 0.0]]

    Raises:
        BadInput: the number of heads is no square.
    """
    side = math.isqrt(max(num_heads, 0))
    if num_heads < 1 or side * side != num_heads:
        raise BadInput(f"num_heads must be a square (1, 4, 9, ...) for the local start, got {num_heads}")
    return _xy(torch.arange(num_heads), side) - (side - 1) / 2


class GatedPositionalSelfAttention(Mixer):
    """Multi-head attention of patches on a grid, each head gated between content and position.

    Args:
        d_model: the width D.
        num_heads: H; a square for the local start.
        width: patches in a row of the grid, filled row by row; by default the root of T, rounded up. The last row may
            be incomplete.
        locality: a, how sharply a head looks at its offset at the start.
        local: whether heads start at the offsets of a square around the patch, and values as the identity; otherwise
            all of it is random.
        value_size: V; by default D / H. With D, a head can be one tap of a convolution (K is rounded down).

    Shapes:
        (B, T, D) -> (B, T, D)

    Example:
        >>> mixer = GatedPositionalSelfAttention(8, num_heads=4)
        >>> mixer(torch.randn(2, 9, 8)).shape
        torch.Size([2, 9, 8])
        >>> mixer.gates()[0].item() == torch.tensor(1.0).sigmoid().item()
        True

    Raises:
        BadInput: heads do not divide the width or are no square, or a size is below 1.
    """

    causal = False

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 4,
        width: int | None = None,
        locality: float = 1.0,
        local: bool = True,
        value_size: int | None = None,
    ) -> None:
        super().__init__(d_model)
        self.num_heads, self.width = num_heads, width
        self.value_size = head_size(d_model, num_heads) if value_size is None else value_size
        key_size = max(d_model // max(num_heads, 1), 1)
        for name, value in {"num_heads": num_heads, "width": width, "value_size": self.value_size}.items():
            if value is not None and value < 1:
                raise BadInput(f"{name} must be at least 1, got {value}")
        if not math.isfinite(locality):
            raise BadInput(f"locality must be finite, got {locality}")
        self.qk = nn.Linear(d_model, 2 * num_heads * key_size, bias=False)
        self.v = nn.Linear(d_model, num_heads * self.value_size, bias=False)
        self.position = nn.Parameter(torch.randn(num_heads, 3) * 0.5)
        self.gate = nn.Parameter(torch.ones(num_heads))
        self.out = nn.Linear(num_heads * self.value_size, d_model)
        if local:
            self.look_at(head_offsets(num_heads), locality)
            with torch.no_grad():  # each channel goes to a head, or to every head where values are whole tokens
                channel = torch.arange(num_heads * self.value_size) % d_model
                self.v.weight.copy_(torch.eye(d_model)[channel])

    @classmethod
    def from_conv(
        cls, conv: nn.Conv2d, *, width: int | None = None, locality: float = 46.0, gate: float = 40.0
    ) -> GatedPositionalSelfAttention:
        """Return the mixer that is ``conv``, with what lies beyond the border repeated from it.

        With ``locality`` and ``gate`` of 1, as in the paper, it is near the convolution and learns to leave it.

        Args:
            conv: of an odd square kernel, stride 1, as many output as input channels, one group; may be dilated.
            width: patches in a row; by default the root of T.
            locality: how sharply each head looks at its tap; e^-46 is below the rounding of float64.
            gate: before the logistic function; 40 closes content out to the rounding of float64.

        Raises:
            BadInput: ``conv`` is another kind of convolution.
        """
        size, dilation, channels = conv.kernel_size[0], conv.dilation[0], conv.in_channels
        square = (conv.kernel_size, conv.dilation, conv.stride) == ((size, size), (dilation, dilation), (1, 1))
        if not (square and size % 2 == 1 and conv.groups == 1 and conv.out_channels == channels):
            raise BadInput(f"conv must have an odd square kernel, stride 1, one group and equal channels, got {conv}")
        mixer = cls(channels, num_heads=size**2, width=width, value_size=channels)
        mixer = mixer.to(conv.weight.device, conv.weight.dtype)
        mixer.look_at(head_offsets(size**2) * dilation, locality)
        with torch.no_grad():
            mixer.gate.fill_(gate)
            mixer.out.weight.copy_(conv.weight.flatten(2).transpose(1, 2).flatten(1))  # taps row by row, as heads
            mixer.out.bias.copy_(torch.zeros_like(mixer.out.bias) if conv.bias is None else conv.bias)
        return mixer

    def look_at(self, offset: Tensor, strength: float) -> None:
        """Make the position score of head h -strength |delta - offset_h|^2 up to a constant; ``offset``: (H, 2)."""
        with torch.no_grad():
            self.position.copy_(-strength * torch.cat([-2 * offset, torch.ones(len(offset), 1)], dim=-1))

    def gates(self) -> Tensor:
        """Return the share of position in the weights of each head, (H,)."""
        return self.gate.detach().sigmoid()

    def attention(self, x: Tensor) -> Tensor:
        """Return the weights, (B, T, D) -> (B, H, T, T)."""
        content = attention_weights(*self._queries_and_keys(self.checked(x)))
        gate = self.gate.sigmoid()[:, None, None].to(content.dtype)
        return content * (1 - gate) + attention_weights(*self._places(x), scale=1.0) * gate

    def attention_distance(self, x: Tensor) -> Tensor:
        """Return how far each head looks, sum_j A_ij |delta_ij|, the mean over tokens and batch, (B, T, D) -> (H,)."""
        weights, place = self.attention(x), self._grid(x)
        return torch.einsum("bhts,ts->bht", weights, torch.cdist(place, place).to(weights.dtype)).mean((0, 2))

    def forward(self, x: Tensor) -> Tensor:
        """Mix ``x``, (B, T, D) -> (B, T, D)."""
        q, k = self._queries_and_keys(self.checked(x))
        v = split_heads(self.v(x), self.num_heads)  # (B, T, H, V)
        # A sum of weights mixes the sum of what each mixes: content by the fused kernel, position for the whole batch
        # at once, as values B times as wide.
        batched = v.permute(1, 2, 0, 3).flatten(2)[None]  # (1, T, H, B V)
        near = attend(*self._places(x), batched, scale=1.0, form="blocks")
        near = torch.unflatten(near[0], -1, (len(x), self.value_size)).permute(2, 0, 1, 3)  # (B, T, H, V)
        gate = self.gate.sigmoid()[:, None].to(v.dtype)
        y: Tensor = self.out(merge_heads(attend(q, k, v) * (1 - gate) + near * gate))
        return y

    def _places(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys, (1, T, H, 3), whose products are v . r up to a constant for each query."""
        place = self._grid(x)
        place = place - place.mean(0)  # small numbers, whose squares lose little
        vector = self.position.to(place.dtype)
        keys = torch.cat([place, place.square().sum(-1, keepdim=True)], dim=-1)
        bend = vector[:, 2:]
        slopes = vector[:, :2] - 2 * bend * place[:, None]  # (T, H, 2)
        queries = torch.cat([slopes, bend.expand(*slopes.shape[:2], 1)], dim=-1)
        return queries[None], keys[None, :, None].expand(1, -1, self.num_heads, -1)

    def _queries_and_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k = self.qk(x).chunk(2, dim=-1)
        return split_heads(q, self.num_heads), split_heads(k, self.num_heads)

    def _grid(self, x: Tensor) -> Tensor:
        """Return where each token stands, (T, 2), in float32 at least."""
        width = math.isqrt(max(x.shape[1] - 1, 0)) + 1 if self.width is None else self.width
        return _xy(torch.arange(x.shape[1], device=x.device), width).to(torch.promote_types(x.dtype, torch.float32))


def convit(
    d_model: int = 192,
    layers: int = 12,
    *,
    gpsa_layers: int = 10,
    num_heads: int = 4,
    locality: float = 1.0,
    image_size: int = 224,
    patch_size: int = 16,
    channels: int = 3,
    classes: int = 1000,
) -> VisionModel:
    """Return a ConViT: layers of gated positional attention on patches, then plain ones that a class token joins.

    Args:
        d_model: the width; 192, 432 and 768 in the paper, with 4, 9 and 16 heads.
        layers: blocks of both kinds.
        gpsa_layers: how many of them, not all, are of gated positional attention.
        num_heads: a square.
        locality: of the first layers.
        image_size, patch_size, channels, classes: as for :class:`VisionModel`.

    Example:
        >>> model = convit(16, 2, gpsa_layers=1, image_size=8, patch_size=2, channels=1, classes=10)
        >>> model(torch.zeros(1, 1, 8, 8)).shape
        torch.Size([1, 10])

    Raises:
        BadInput: ``gpsa_layers`` leaves no plain layer, or a setting does not fit the model.
    """
    if not 0 <= gpsa_layers < layers:
        raise BadInput(f"gpsa_layers must lie in [0, {layers}), got {gpsa_layers}")

    first = partial(GatedPositionalSelfAttention, num_heads=num_heads, locality=locality)
    last = partial(SelfAttention, num_heads=num_heads)
    return VisionModel(
        d_model,
        layers,
        [first] * gpsa_layers + [last] * (layers - gpsa_layers),
        image_size=image_size,
        patch_size=patch_size,
        channels=channels,
        classes=classes,
        class_from=gpsa_layers,
    )
