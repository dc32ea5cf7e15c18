"""Attention to the keys that a cheap low-rank guess of the attention matrix ranks first, for each input anew.

`Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers
<https://arxiv.org/abs/2303.13755>`_ (Wei et al., 2023): with q' = Q W_q, k' = K W_k of c columns and P, U of n rows and
m columns, Ahat = softmax_m(q' (k'^T P) / sqrt(c)) U^T; row i attends to the ceil(keep n) keys of the largest
(coefficients' 8 largest) . (|U|^T where above 0.02), the class token to all.

Departures: scores of the guess are divided by sqrt(c), as the paper writes; its code divides by the root of the number
of heads. Fewer than n tokens use the first rows of P and U. The guess is made in float32 at least.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.catalogue import Card, Claim
from torchgraft.engines.attention import Mask, Rows, attend
from torchgraft.engines.attention.mixer import AttentionMixer
from torchgraft.errors import BadInput

__all__ = ["CARD", "Connectivity", "SparsifinerAttention", "gathered_attention", "kept_keys"]

CARD = Card(
    key="sparsifiner",
    title="Sparsifiner: attention whose pairs are predicted",
    seed_id=98,
    authors="Wei et al., 2023",
    reference="https://arxiv.org/abs/2303.13755",
    family="parts/mixers",
    kind="part",
    engine=("attention", "masks"),
    equation="Ahat = softmax(q' (k'^T P) / sqrt(c)) U^T,  M_ij = [j among the ceil(keep n) largest of Ahat_i], "
    "O = softmax(Q K^T / sqrt(K) where M) V",
    entry="SparsifinerAttention",
    declared={"parameters": "4*d_model**2 + 2*c_down*(d_model//num_heads + 1) + 2*tokens*n_down"},
    example={"d_model": 16, "num_heads": 2, "tokens": 80, "n_down": 10, "c_down": 4, "keep": 0.5},
    shapes=((2, 12, 16),),
    oracles=(
        "with keep 1 it is dense softmax attention",
        "every row but the class token's has exactly ceil(keep n) keys, and the mask is that of the formula by loops",
        "only the kept pairs, gathered, give what the dense masked attention gives, gradients included",
        "the output leaves no gradient at all in the predictor; recon_loss leaves one in every weight of it",
        "recon_loss is zero for the guess itself, and a rank-m attention matrix is learned from it",
    ),
    claim=Claim(
        text="Digits, a token a pixel (64 and a class token), width 32, two layers of two heads, a quarter of the keys "
        "kept: the dense model, tuned on by masks that are predicted, random and a window of the nearest pixels.",
        figure="accuracy at most 1.5 points below dense; multiply-adds of QK and AV at least 60 % fewer; a random mask "
        "and a window of the same budget each at least 2 points below it",
    ),
    choose_when="a trained vision transformer spends its time on attention between many tokens of a fixed number",
    choose_instead="the fused dense kernel for few tokens, which is faster than a quarter of the pairs, gathered",
    expected_failures={
        "autocast-is-near-float32": "which pairs are kept is a choice between near-equal guesses, which rounding of "
        "queries and keys to bfloat16 turns over",
        "every-parameter-gets-a-gradient": "the predictor decides which pairs there are, and no gradient goes through "
        "that decision; it learns from recon_loss",
    },
    bibtex="""@inproceedings{wei2023sparsifiner,
  title={Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers},
  author={Wei, Cong and Duke, Brendan and Jiang, Ruowei and Aarabi, Parham and Taylor, Graham W. and Shkurti, Florian},
  booktitle={IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2023}
}""",
)

#: Queries whose keys are gathered at once.
_ROWS = 64


def kept_keys(tokens: int, keep: float) -> int:
    """Return how many keys a query keeps, ceil(keep tokens), at least 1.

    Example:
        >>> kept_keys(65, 0.25), kept_keys(100, 0.07), kept_keys(3, 0.1)
        (17, 7, 1)
    """
    return max(math.ceil(keep * tokens - 1e-9), 1)


class Connectivity(Mask):
    """The keys of the largest entries of each row of a product of two thin matrices, which is never written out.

    Args:
        coefficients: (B, H, T, m).
        basis: (m, S).
        kept: how many keys a row keeps.
        class_token: whether the first row keeps all of them.
    """

    def __init__(self, coefficients: Tensor, basis: Tensor, kept: int, *, class_token: bool = False) -> None:
        self.coefficients, self.basis, self.kept, self.class_token = coefficients, basis, kept, class_token

    def keys(self, queries: slice) -> Tensor:
        """Return the places of the kept keys of some rows, class token or not, (B, H, t, kept)."""
        return (self.coefficients[:, :, queries] @ self.basis).topk(self.kept, dim=-1, sorted=False).indices

    def seen(self, rows: Rows) -> Tensor:
        """Return True where the row keeps the key."""
        places = self.keys(rows.queries)
        found = torch.zeros(*places.shape[:-1], self.basis.shape[-1], dtype=torch.bool, device=places.device)
        found.scatter_(-1, places, True)
        if self.class_token and rows.queries.start == 0:
            found[:, :, 0] = True
        return found[..., rows.keys]


def gathered_attention(q: Tensor, k: Tensor, v: Tensor, mask: Connectivity) -> Tensor:
    """Return softmax attention in which only the pairs that ``mask`` keeps are ever computed.

    Shapes:
        q, k, v: (B, T, H, K) -> (B, T, H, K)
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        queries, keys, values = (part.to(wide).transpose(1, 2) for part in (q, k, v))  # (B, H, T, K)
        first = int(mask.class_token)
        mixed = [F.scaled_dot_product_attention(queries[:, :, :first], keys, values)]
        for start in range(first, q.shape[1], _ROWS):
            block = slice(start, min(start + _ROWS, q.shape[1]))
            places = mask.keys(block)  # (B, H, t, kept)
            near_keys, near_values = (
                torch.unflatten(
                    part.gather(2, places.flatten(2)[..., None].expand(-1, -1, -1, part.shape[-1])),
                    2,
                    places.shape[2:],
                )
                for part in (keys, values)
            )  # (B, H, t, kept, K)
            scores = torch.einsum("bhtk,bhtsk->bhts", queries[:, :, block] * q.shape[-1] ** -0.5, near_keys)
            mixed.append(torch.einsum("bhts,bhtsk->bhtk", scores.softmax(-1), near_values))
    return torch.cat(mixed, dim=2).transpose(1, 2).to(v.dtype)


class SparsifinerAttention(AttentionMixer):
    """Multi-head attention with a predictor of the keys that each query needs.

    First train it with ``sparse = False`` and the sum of :meth:`recon_loss` over layers, against the weights of a
    frozen dense model, which alone teaches the predictor; then with ``sparse = True`` for the task and that model's
    outputs.

    Args:
        d_model: the width D.
        num_heads: H; divides ``d_model``.
        tokens: n, the most tokens that there may be, class token included.
        n_down: m, columns of the basis; by default a sixth of ``tokens``.
        c_down: c, to which queries and keys shrink; by default half a head.
        keep: share of the keys that a query keeps.
        basis_topk: coefficients that count where keys are chosen.
        basis_eps: entries of the basis that are no larger in size count as zero there.
        class_token: whether the first token sees all others.
        sparse: whether only kept pairs count; may be set at any time.
        gather: whether kept pairs are computed alone instead of hidden from a dense product; may be set at any time.

    Shapes:
        (B, T, D) -> (B, T, D), T at most ``tokens``

    Example:
        >>> mixer = SparsifinerAttention(16, num_heads=2, tokens=24)
        >>> mixer(torch.randn(2, 24, 16)).shape
        torch.Size([2, 24, 16])
        >>> mixer.connectivity(torch.randn(2, 24, 16)).sum(-1)[0, 0].tolist()[:3]
        [24, 6, 6]

    Raises:
        BadInput: heads do not divide the width, a size is below 1, or ``keep`` is outside (0, 1].
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 4,
        tokens: int = 197,
        n_down: int | None = None,
        c_down: int | None = None,
        keep: float = 0.25,
        basis_topk: int = 8,
        basis_eps: float = 0.02,
        class_token: bool = True,
        sparse: bool = True,
        gather: bool = False,
    ) -> None:
        super().__init__(d_model, num_heads=num_heads, rotary=False, causal=False)
        n_down = max(tokens // 6, 1) if n_down is None else n_down
        c_down = max(self.key_size // 2, 1) if c_down is None else c_down
        for name, value in {"tokens": tokens, "n_down": n_down, "c_down": c_down, "basis_topk": basis_topk}.items():
            if value < 1:
                raise BadInput(f"{name} must be at least 1, got {value}")
        if not 0 < keep <= 1:
            raise BadInput(f"keep must lie in (0, 1], got {keep}")
        if not basis_eps >= 0:
            raise BadInput(f"basis_eps must be at least 0, got {basis_eps}")
        self.tokens, self.keep, self.basis_topk, self.basis_eps = tokens, keep, min(basis_topk, n_down), basis_eps
        self.class_token, self.sparse, self.gather = class_token, sparse, gather
        self.query_down = nn.Linear(self.key_size, c_down)
        self.key_down = nn.Linear(self.key_size, c_down)
        self.token_down = nn.Parameter(nn.init.trunc_normal_(torch.empty(tokens, n_down), std=0.02))
        self.token_up = nn.Parameter(nn.init.trunc_normal_(torch.empty(tokens, n_down), std=0.02))

    def coefficients(self, q: Tensor, k: Tensor) -> Tensor:
        """Return what each query weighs the rows of the basis by, shares of 1, (B, T, H, K) twice -> (B, H, T, m).

        Raises:
            BadInput: there are more than ``tokens`` tokens.
        """
        if k.shape[1] > self.tokens:
            raise BadInput(f"x must have at most tokens = {self.tokens} tokens, got {k.shape[1]}")
        wide = torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(q.device.type, enabled=False):
            small_q, small_k = (
                F.linear(part.to(wide), shrink.weight.to(wide), shrink.bias.to(wide)).transpose(1, 2)
                for part, shrink in ((q, self.query_down), (k, self.key_down))
            )  # (B, H, T, c)
            summary = small_k.mT @ self.token_down[: k.shape[1]].to(wide)  # (B, H, c, m)
            return torch.softmax(small_q @ summary * small_q.shape[-1] ** -0.5, dim=-1)

    def mask(self, q: Tensor, k: Tensor) -> Connectivity:
        """Return who sees whom; (B, T, H, K) twice."""
        with torch.no_grad():
            coefficients = self.coefficients(q, k)
            largest = coefficients.topk(self.basis_topk, dim=-1)
            coefficients = torch.zeros_like(coefficients).scatter_(-1, largest.indices, largest.values)
            basis = self.token_up[: k.shape[1]].to(coefficients.dtype).abs().mT  # (m, T)
            basis = basis.where(basis > self.basis_eps, 0.0)
        kept = kept_keys(k.shape[1], self.keep)
        return Connectivity(coefficients, basis, kept, class_token=self.class_token)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return what the queries mix."""
        if not self.sparse:
            return attend(q, k, v)
        mask = self.mask(q, k)
        return gathered_attention(q, k, v, mask) if self.gather else attend(q, k, v, mask=mask)

    def connectivity(self, x: Tensor) -> Tensor:
        """Return who sees whom as booleans, (B, T, D) -> (B, H, T, T)."""
        q, k, _ = self.heads(self.checked(x), 0)
        place = torch.arange(x.shape[1], device=x.device)
        whole = slice(0, x.shape[1])
        return self.mask(q, k).seen(Rows(whole, whole, place, place))

    def recon_loss(self, x: Tensor, teacher: Tensor) -> Tensor:
        """Return how far the raw guess is from ``teacher``: squares summed over pairs and heads, the mean of the batch.

        Args:
            x: what this mixer gets, (B, T, D).
            teacher: weights of a dense attention, (B, H, T, T); the class token's row does not count.

        Raises:
            BadInput: ``teacher`` has another shape.
        """
        q, k, _ = self.heads(self.checked(x), 0)
        coefficients = self.coefficients(q, k)
        guess = coefficients @ self.token_up[: x.shape[1]].mT.to(coefficients.dtype)
        if teacher.shape != guess.shape:
            raise BadInput(f"teacher must have shape {tuple(guess.shape)}, got {tuple(teacher.shape)}")
        gap = (guess - teacher)[:, :, int(self.class_token) :]
        return gap.square().sum((1, 2, 3)).mean()
