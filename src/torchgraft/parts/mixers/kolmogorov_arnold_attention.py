"""Attention whose softmax is replaced by a learned map of a whole row of scores, made of functions of one number each.

`Kolmogorov-Arnold Attention: Is Learnable Attention Better For Vision Transformers?
<https://arxiv.org/abs/2503.10632>`_ (Maity et al., 2025): a row a of N scores becomes W [sum_q phi_pq(a_q)]_{p<=R} with
phi_pq(t) = sum_{m<=G} alpha_pqm cos(m t) + beta_pqm sin(m t) and W of N rows and R columns, for each head its own.

Departures: only this modular Fourier form, neither the full one of N^2 functions nor other bases. Fewer than N tokens
use the functions and the rows of W of the first columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from torchgraft.catalogue import Card, Claim
from torchgraft.engines.attention import Rows, Stage, attend, attention_weights
from torchgraft.engines.attention.mixer import AttentionMixer
from torchgraft.errors import BadInput

__all__ = [
    "CARD",
    "FourierOperator",
    "FourierRow",
    "KolmogorovArnoldAttention",
    "row_operators",
    "simplex_projection",
]

CARD = Card(
    key="kolmogorov-arnold-attention",
    title="Kolmogorov-Arnold attention (Fourier-KArAt)",
    seed_id=151,
    authors="Maity et al., 2025",
    reference="https://arxiv.org/abs/2503.10632",
    family="parts/mixers",
    kind="part",
    engine=("attention",),
    equation="A_i = W [sum_j phi_pj(q_i . k_j / sqrt(K))]_p,  phi_pj(t) = sum_m alpha_pjm cos(m t) + beta_pjm sin(m t)",
    entry="KolmogorovArnoldAttention",
    declared={"parameters": "4*d_model**2 + num_heads*tokens*rank*(2*grid + 1)"},
    example={"d_model": 16, "num_heads": 2, "tokens": 80, "rank": 5, "grid": 2},
    shapes=((2, 12, 16),),
    oracles=(
        "the row operator equals four nested loops",
        "shared by all blocks it is one object, with 1/L of the parameters",
        "the projection on the simplex is nonnegative, sums to 1, is idempotent and is what SLSQP finds",
        "the derivative by score q goes through column q of the functions alone",
        "weights have rank R at most",
    ),
    claim=Claim(
        text="Digits as 16 patches and a class token, width 48, 3 heads, 3 blocks, 20 epochs: softmax beside KArAt "
        "with an operator a block (R 12, G 3), one for all blocks, and one a block projected on the simplex.",
        figure="either unprojected operator between 1 point below and 3 points above softmax; the projected one not "
        "better than the same unprojected; at most 12 singular values above 1e-3 of the largest",
    ),
    choose_when="a study of what attention may be other than softmax, on few tokens of a fixed number; the paper gains "
    "on ViT-Tiny and loses on ViT-Base",
    choose_instead="softmax attention for speed, masks, other numbers of tokens, or large models",
    bibtex="""@article{maity2025karat,
  title={Kolmogorov-Arnold Attention: Is Learnable Attention Better For Vision Transformers?},
  author={Maity, Subhajit and Hitsman, Killian and Li, Xin and Dutta, Aritra},
  journal={arXiv preprint arXiv:2503.10632},
  year={2025}
}""",
)


def simplex_projection(y: Tensor) -> Tensor:
    """Return the nearest point to each row that is nonnegative and sums to 1.

    Shapes:
        (..., N) -> (..., N)

    Example:
        >>> simplex_projection(torch.tensor([1.0, 0.5, -1.0])).tolist()
        [0.75, 0.25, 0.0]
    """
    largest = y.sort(dim=-1, descending=True).values
    rank = torch.arange(1, y.shape[-1] + 1, device=y.device)
    excess = largest.cumsum(-1) - 1  # of the j largest over 1
    support = (largest * rank > excess).sum(-1, keepdim=True).clamp_min(1)
    return (y - excess.gather(-1, support - 1) / support).clamp_min(0)


@dataclass(frozen=True, eq=False)
class FourierRow(Stage):
    """A = W [sum_q phi_pq(s_q)]_p for every row of scores; rows need be neither positive nor of sum 1.

    Args:
        cosine: alpha, (H, R, N, G).
        sine: beta, (H, R, N, G).
        mix: W, (H, N, R).
        project: whether rows are projected on the probability simplex.
    """

    cosine: Tensor
    sine: Tensor
    mix: Tensor
    project: bool = False

    def __call__(self, s: Tensor, rows: Rows) -> Tensor:
        """Return the weights.

        Raises:
            BadInput: some keys are hidden: a function of a hidden score would still count.
        """
        if rows.seen is not None:
            raise BadInput("Kolmogorov-Arnold attention takes no mask: every row operator reads a whole row")
        order = torch.arange(1, self.cosine.shape[-1] + 1, device=s.device, dtype=s.dtype)
        angle = (s[..., None] * order).flatten(-2)  # (B, H, t, s G)
        cosine, sine = (part[:, :, rows.keys].to(s.dtype).flatten(-2).mT for part in (self.cosine, self.sine))
        inner = angle.cos() @ cosine + angle.sin() @ sine  # (B, H, t, R)
        weights = inner @ self.mix[:, rows.keys].to(s.dtype).mT
        return simplex_projection(weights) if self.project else weights


class FourierOperator(nn.Module):
    """The learned functions and W of all heads, of one block or shared by several.

    Args:
        num_heads: H.
        tokens: N, the most tokens that there may be.
        rank: R.
        grid: G, frequencies of each function.

    Raises:
        BadInput: a size is below 1.
    """

    def __init__(self, num_heads: int, tokens: int, *, rank: int = 12, grid: int = 3) -> None:
        super().__init__()
        for name, value in {"num_heads": num_heads, "tokens": tokens, "rank": rank, "grid": grid}.items():
            if value < 1:
                raise BadInput(f"{name} must be at least 1, got {value}")
        self.tokens = tokens
        shape = num_heads, rank, tokens, grid
        self.cosine = nn.Parameter(torch.randn(shape) * (tokens * grid) ** -0.5)
        self.sine = nn.Parameter(torch.randn(shape) * (tokens * grid) ** -0.5)
        self.mix = nn.Parameter(torch.empty(num_heads, tokens, rank).uniform_(-(rank**-0.5), rank**-0.5))

    def forward(self, *, project: bool = False) -> FourierRow:
        """Return the stage that :func:`torchgraft.engines.attention.attend` takes as ``normalize``."""
        return FourierRow(self.cosine, self.sine, self.mix, project)


def row_operators(
    layers: int,
    *,
    num_heads: int,
    tokens: int,
    rank: int = 12,
    grid: int = 3,
    share: Literal["block", "universal"] = "block",
) -> list[FourierOperator]:
    """Return the row operator of each of ``layers`` blocks.

    Args:
        layers: L.
        num_heads: H of every block.
        tokens: N.
        rank: R.
        grid: G.
        share: ``"block"`` for an operator a block, ``"universal"`` for one that all blocks share.

    Example:
        >>> first, second = row_operators(2, num_heads=1, tokens=4, share="universal")
        >>> first is second
        True

    Raises:
        BadInput: ``share`` is neither.
    """
    if share not in ("block", "universal"):
        raise BadInput(f"share must be 'block' or 'universal', got {share!r}")
    made = [FourierOperator(num_heads, tokens, rank=rank, grid=grid) for _ in range(1 if share != "block" else layers)]
    return made if share == "block" else made * layers


class KolmogorovArnoldAttention(AttentionMixer):
    """Multi-head attention with a learned row operator for softmax; every token sees every token.

    Args:
        d_model: the width D.
        num_heads: H; divides ``d_model``.
        tokens: N, the most tokens that there may be.
        rank: R.
        grid: G, frequencies of each function; 3 in the paper's small models, 1 in its base model.
        project: whether rows are projected on the probability simplex, which cost the paper accuracy.
        operator: one that other blocks share, see :func:`row_operators`; ``tokens``, ``rank`` and ``grid`` are its own.

    Shapes:
        (B, T, D) -> (B, T, D), T at most ``tokens``

    Example:
        >>> mixer = KolmogorovArnoldAttention(8, num_heads=2, tokens=6)
        >>> mixer(torch.randn(2, 6, 8)).shape
        torch.Size([2, 6, 8])

    Raises:
        BadInput: heads do not divide the width, a size is below 1, or the shared operator has another number of heads.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 4,
        tokens: int = 197,
        rank: int = 12,
        grid: int = 3,
        project: bool = False,
        operator: FourierOperator | None = None,
    ) -> None:
        super().__init__(d_model, num_heads=num_heads, rotary=False, causal=False)
        self.operator = FourierOperator(num_heads, tokens, rank=rank, grid=grid) if operator is None else operator
        if len(self.operator.mix) != num_heads:
            raise BadInput(f"operator must have num_heads = {num_heads} heads, got {len(self.operator.mix)}")
        self.project = project

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return what the queries mix."""
        return attend(q, k, v, normalize=self._stage(k.shape[1]))

    def attention(self, x: Tensor) -> Tensor:
        """Return the weights, (B, T, D) -> (B, H, T, T)."""
        q, k, _ = self.heads(self.checked(x), 0)
        return attention_weights(q, k, normalize=self._stage(x.shape[1]))

    def _stage(self, tokens: int) -> FourierRow:
        if tokens > self.operator.tokens:
            raise BadInput(f"x must have at most tokens = {self.operator.tokens} tokens, got {tokens}")
        stage: FourierRow = self.operator(project=self.project)
        return stage
