"""Linear attention normalised by subtraction, under which different queries keep different weights, with a local term.

`Bridging the Divide: Reconsidering Softmax and Linear Attention <https://arxiv.org/abs/2412.06590>`_ (Han et al.,
2024): w_ij = phi(q_i) . phi(k_j) - (1/N) sum_m phi(q_i) . phi(k_m) + 1/N, and o_i = sum_j w_ij v_j + sum_{j in 3x3(i)}
r_{j-i} v_j with r = MLP(mean_i x_i). Dividing by sum_m phi(q_i) . phi(k_m) instead maps q and 2q to the same weights.

Departures: no class token and no biases before the output (a bias on the keys cancels in the subtraction); the ``exp``
features are cut at exp(20), since nothing divides them afterwards.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.engines.recurrence.heads import head_size, merge_heads, split_heads
from torchgraft.engines.recurrence.mixer import Mixer
from torchgraft.errors import BadInput, nearest

__all__ = ["CARD", "InLineAttention", "dynamic_conv3x3", "inline_attention", "injectivity_probe"]

CARD = Card(
    key="inline-attention",
    title="Injective linear attention (InLine)",
    seed_id=283,
    authors="Han et al., 2024",
    reference="https://arxiv.org/abs/2412.06590",
    family="parts/mixers",
    kind="part",
    equation="w_ij = phi(q_i) . phi(k_j) - (1/N) sum_m phi(q_i) . phi(k_m) + 1/N, plus r on the 3x3 around i",
    entry="InLineAttention",
    capabilities=frozenset({"linear-time", "compilable"}),
    declared={"parameters": "4*d_model**2 + 11*d_model + 10*d_model**2 // num_heads"},
    example={"d_model": 16, "num_heads": 2, "width": 4},
    shapes=((2, 12, 16),),
    oracles=(
        "the linear form equals the weights written out, whose rows sum to 1",
        "a constant vector added to all phi(k) changes nothing",
        "ReLU attention with division gives q and 2q the same output; this one does not when the centred keys have "
        "full rank, and the distance of the weights is bounded below by their smallest singular value",
        "the local term with r = 1 at the centre adds V, and moves with the image in the interior",
    ),
    claim=Claim(
        text="Digits as 64 pixel tokens, two blocks of width 32: softmax, linear (ReLU, division), InLine without the "
        "local term, InLine; the share of query pairs whose weights have a cosine above 0.999.",
        figure="InLine without the local term >= 2 points above linear, with it >= softmax - 0.5 points; confused "
        "query pairs at least 5x fewer than linear's; counted work of 4096 tokens < 5x that of 1024",
    ),
    choose_when="an image has so many tokens that attention over all of them or over large windows costs too much",
    choose_instead="softmax attention where tokens are few; a causal linear mixer where tokens arrive one by one",
    bibtex="""@inproceedings{han2024bridging,
  title={Bridging the Divide: Reconsidering Softmax and Linear Attention},
  author={Han, Dongchen and Pu, Yifan and Xia, Zhuofan and Han, Yizeng and Pan, Xuran and Li, Xiu and Lu, Jiwen and
    Song, Shiji and Huang, Gao},
  booktitle={Advances in Neural Information Processing Systems},
  year={2024}
}""",
)

_KERNELS = ("identity", "relu", "exp")


def _features(x: Tensor, kernel: str) -> Tensor:
    if kernel not in _KERNELS:
        raise BadInput(f"kernel must be one of {', '.join(_KERNELS)}, got {kernel!r}{nearest(kernel, list(_KERNELS))}")
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if kernel == "exp":
        return wide.clamp(max=20.0).exp()
    return wide.relu() if kernel == "relu" else wide


def inline_attention(q: Tensor, k: Tensor, v: Tensor, *, kernel: str = "identity") -> Tensor:
    """Return sum_j w_ij v_j with w_ij = f(q_i) . (f(k_j) - mean f(k)) + 1/N, f(q) scaled by K^(-1/2) / N.

    Args:
        q: queries.
        k: keys.
        v: values.
        kernel: what is applied to queries and keys: ``"identity"``, ``"relu"`` or ``"exp"``.

    Shapes:
        q: (B, T, H, K); k: (B, N, H, K); v: (B, N, H, V) -> (B, T, H, V).

    Example:
        >>> q, k, v = (torch.randn(1, 4, 1, 2) for _ in range(3))
        >>> bool(torch.allclose(inline_attention(0 * q, k, v), v.mean(1, keepdim=True).expand_as(v), atol=1e-6))
        True
    """
    sinks, sources, values = (
        _features(q, kernel) * q.shape[-1] ** -0.5,
        _features(k, kernel),
        v.to(torch.promote_types(v.dtype, torch.float32)),
    )
    centred = sources - sources.mean(1, keepdim=True)
    memory = torch.einsum("bnhk,bnhv->bhkv", centred, values) / k.shape[1]
    return (torch.einsum("bthk,bhkv->bthv", sinks, memory) + values.mean(1, keepdim=True)).to(v.dtype)


def dynamic_conv3x3(v: Tensor, taps: Tensor, width: int) -> Tensor:
    """Return sum_{j in 3x3(i)} r_{j-i} v_j on an image whose rows stand one after another, zeros around it.

    Args:
        v: the image.
        taps: r, row by row, one kernel for each sample and channel.
        width: pixels a row; a last row that is not full is filled with zeros.

    Shapes:
        v: (B, T, C); taps: (B, C, 9) -> (B, T, C).
    """
    tokens = v.shape[1]
    height = -(-tokens // width)
    filled = F.pad(v, (0, 0, 0, height * width - tokens))
    image = filled.reshape(len(v), height, width, v.shape[-1])
    framed = F.pad(image, (0, 0, 1, 1, 1, 1))
    weights = taps.mT[:, :, None, None]  # (B, 9, 1, 1, C)
    total = torch.zeros_like(image)
    for place in range(9):
        down, right = divmod(place, 3)
        total = total + weights[:, place] * framed[:, down : down + height, right : right + width]
    return total.flatten(1, 2)[:, :tokens]


def injectivity_probe(weights: Tensor, *, cosine: float = 0.999) -> float:
    """Return the share of pairs of queries that attention hardly tells apart.

    Args:
        weights: attention weights, one row a query.
        cosine: from which cosine of two rows on they count as confused.

    Shapes:
        weights: (..., T, N).

    Example:
        >>> injectivity_probe(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]]))
        0.3333333432674408
    """
    rows = F.normalize(weights, dim=-1)
    upper = torch.ones(rows.shape[-2], rows.shape[-2], dtype=torch.bool, device=rows.device).triu(1)
    return float(((rows @ rows.mT)[..., upper] > cosine).float().mean())


class InLineAttention(Mixer):
    """Injective linear attention over the pixels of an image, with a 3x3 term whose taps depend on the image.

    Args:
        d_model: the width D.
        num_heads: H; divides ``d_model``.
        width: pixels a row of the image; a last row that is not full is filled with zeros.
        height: rows of the image; ``None`` takes images of any height.
        kernel: what is applied to queries and keys: ``"identity"``, ``"relu"`` or ``"exp"``.
        local: whether the 3x3 term is added. Without it the order of the tokens does not matter.

    Shapes:
        (B, T, D) -> (B, T, D), the tokens row by row

    Example:
        >>> InLineAttention(8, num_heads=2, height=3, width=4)(torch.randn(1, 12, 8)).shape
        torch.Size([1, 12, 8])

    Raises:
        BadInput: an argument is out of range, or the image has another height than was said.
    """

    causal = False

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 4,
        width: int = 8,
        height: int | None = None,
        kernel: str = "identity",
        local: bool = True,
    ) -> None:
        super().__init__(d_model)
        if width < 1 or (height is not None and height < 1):
            raise BadInput(f"height and width must be at least 1, got {height} and {width}")
        if kernel not in _KERNELS:
            raise BadInput(f"kernel must be one of {_KERNELS}, got {kernel!r}{nearest(kernel, list(_KERNELS))}")
        head_size(d_model, num_heads)
        self.num_heads, self.width, self.height, self.kernel = num_heads, width, height, kernel
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model)
        self.local: nn.Sequential | None = None
        if local:
            self.local = nn.Sequential(
                nn.Conv1d(d_model, d_model, 1, groups=num_heads),
                nn.GELU(),
                nn.Conv1d(d_model, 9 * d_model, 1, groups=num_heads),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Mix ``x``, (B, T, D) -> (B, T, D)."""
        self.checked(x)
        if self.height is not None and x.shape[1] != self.height * self.width:
            raise BadInput(f"x must have height * width = {self.height * self.width} tokens, got {x.shape[1]}")
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        mixed = merge_heads(
            inline_attention(*(split_heads(part, self.num_heads) for part in (q, k, v)), kernel=self.kernel)
        )
        if self.local is not None:
            taps = self.local(x.mean(1)[..., None]).reshape(len(x), self.d_model, 9)
            mixed = mixed + dynamic_conv3x3(v, taps.to(v.dtype), self.width)
        y: Tensor = self.out(mixed)
        return y
