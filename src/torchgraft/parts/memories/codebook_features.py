"""Codebooks between the layers of any transformer: hidden states become sums of a few codes that can be read and set.

`Codebook Features: Sparse and Discrete Interpretability for Neural Networks <https://arxiv.org/abs/2310.17230>`_
(Tamkin, Taufeeque and Goodman, 2023). For the activation a of an MLP, or of one attention head before the output
projection, and codes c_1 .. c_N: ahat = sum_{i in S} c_i, S = the k codes of largest cos(a, c_i) (or least |a - c_i|).
The gradient goes to a unchanged, to the codes through the sum and by ``recon_weight * |ahat - stopgrad(a)|^2``.

Departures: no LayerNorm stands before a codebook (the released code has one, which the paper does not mention), so
codes are best started by k-means, divided by k where they are summed. Codes are summed as in the paper;
``reduce="mean"`` divides by k as the released code does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.engines.codebook import Similarity, kmeans, lookup, reseeded, straight_through, usage
from torchgraft.errors import BadInput, nearest

__all__ = ["CARD", "Change", "CodebookBottleneck", "Codes", "Positions", "Reduce", "nearness", "times_active"]

CARD = Card(
    key="codebook-features",
    title="Codebook features",
    seed_id=133,
    authors="Tamkin, Taufeeque and Goodman, 2023",
    reference="https://arxiv.org/abs/2310.17230",
    family="parts/memories",
    kind="part",
    engine=("taps",),
    equation="ahat = sum_{i in S} c_i, S = the k codes of largest cos(a, c_i); da = dahat",
    entry="CodebookBottleneck",
    capabilities=frozenset({"permutation-equivariant", "linear-time"}),
    declared={"parameters": "num_codes * d_model"},
    example={"d_model": 12, "num_heads": 2, "num_codes": 9, "k": 3},
    shapes=((2, 5, 12),),
    oracles=(
        "every output is the sum (or mean) of exactly k rows of the codebook, those that a loop over all codes finds",
        "an activation that is a scaled code returns that code where k = 1 and the similarity is the cosine",
        "the gradient of the activation is exactly the one that arrives, and the codes' that of the written-out sum",
        "activating the codes that are active changes nothing, bit for bit, also while a model generates",
        "with a codebook that holds the activations themselves GPT-2, Llama, BERT and torch's encoder do not move",
        "precision and recall of a code equal the counts by hand, and removed codebooks leave the model as it was",
    ),
    claim=Claim(
        text="A language of 100 states in 10 tokens, two tokens a state and ten successors each; transformer of two "
        "layers, width 32. Codebooks (k = 1) after MLPs and heads, against the plain model; a state's codes set "
        "against adding the difference of mean activations; codes against neurons as detectors of states.",
        figure="validity at least 95 % of the plain model's; a code of precision > 0.8 for at least 80 % of states, "
        "and no neuron above 0.4 for most states; transitions valid for the forced state in at least 80 % of trials, "
        "and more than with added means",
    ),
    choose_when="a transformer is to be read and steered by discrete features, and may be trained a little for it",
    choose_instead="sparse autoencoders where the model may not change; a plain probe where one concept is in question",
    expected_failures={
        "gradients-are-the-derivatives": "the gradient passes straight through the choice of codes, by definition",
    },
    bibtex="""@article{tamkin2023codebook,
  title={Codebook Features: Sparse and Discrete Interpretability for Neural Networks},
  author={Tamkin, Alex and Taufeeque, Mohammad and Goodman, Noah D.},
  journal={arXiv preprint arXiv:2310.17230}, year={2023}}""",
)

Reduce: TypeAlias = Literal["sum", "mean"]
Kind: TypeAlias = Literal["activate", "force", "ablate", "silence"]
#: Codes at a site: numbers where there is one codebook, else head -> numbers.
Codes: TypeAlias = "int | Sequence[int] | Mapping[int, int | Sequence[int]]"
#: Which tokens of a call are meant; numbers that a call has not (as in cached generation) are passed over.
Positions: TypeAlias = "Literal['all'] | int | Sequence[int]"
_CHUNK = 4096


@dataclass(frozen=True)
class Change:
    """An intervention on one bottleneck.

    Args:
        kind: set the active codes (``activate``), have codes among them (``force``), have others take their place
            (``ablate``), or leave them out of the sum (``silence``).
        codes: head -> codes.
        positions: which tokens of a call are meant.
    """

    kind: Kind
    codes: dict[int, list[int]]
    positions: Positions

    def rows(self, batch: int, tokens: int, device: torch.device) -> Tensor:
        """Return which of the B * T tokens are meant."""
        mask = torch.full((tokens,), self.positions == "all", device=device)
        places = [self.positions] if isinstance(self.positions, int) else self.positions
        if self.positions != "all":
            mask[[int(place) for place in places if -tokens <= int(place) < tokens]] = True
        return mask.repeat(batch)


class CodebookBottleneck(nn.Module):
    """One codebook, or one for each head, that the activations of a site pass through.

    Args:
        d_model: width of the activations, all heads together.
        num_codes: codes in each codebook.
        k: how many are active at a time.
        num_heads: number of equal parts of the activation that have a codebook each.
        similarity: ``"cosine"`` or ``"euclid"``.
        reduce: ``"sum"`` of the active codes, or their ``"mean"``.
        recon_weight: weight of the loss that draws codes to activations, see ``Codebooks.watch``.
        commitment: weight of the loss that draws activations to codes (0.25 in the paper's variant).
        replace_after: training passes without use after which a code is drawn anew from activations; 0 for never.
        replace_noise: deviation of the noise on such a code, as a share of the activations'.

    Shapes:
        (B, T, D) -> (B, T, D)

    Example:
        >>> book = CodebookBottleneck(4, num_codes=16, k=2)
        >>> x = torch.randn(1, 3, 4)
        >>> chosen = book.choose(x)
        >>> chosen.shape, torch.equal(book(x)[0, 0], book.codes[0, chosen[0, 0]].sum(0))
        (torch.Size([1, 3, 2]), True)

    Raises:
        BadInput: a size is below 1, k exceeds the codes, or the heads do not divide the width.
    """

    idle: Tensor

    def __init__(
        self,
        d_model: int,
        *,
        num_codes: int = 1024,
        k: int = 8,
        num_heads: int = 1,
        similarity: Similarity = "cosine",
        reduce: Reduce = "sum",
        recon_weight: float = 1.0,
        commitment: float = 0.0,
        replace_after: int = 0,
        replace_noise: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in {"d_model": d_model, "num_codes": num_codes, "k": k, "num_heads": num_heads}.items():
            if value < 1:
                raise BadInput(f"{name} must be at least 1, got {value}")
        if d_model % num_heads or k > num_codes:
            raise BadInput(
                f"num_heads must divide d_model {d_model} and k not exceed num_codes {num_codes}, got {num_heads}, {k}"
            )
        for name, given, kind in (("similarity", similarity, Similarity), ("reduce", reduce, Reduce)):
            if given not in get_args(kind):
                raise BadInput(f"{name} must be known, got {given!r}{nearest(given, [*get_args(kind)])}")
        self.d_model, self.num_codes, self.k, self.num_heads = d_model, num_codes, k, num_heads
        self.similarity, self.reduce = similarity, reduce
        self.recon_weight, self.commitment = recon_weight, commitment
        self.replace_after, self.replace_noise = replace_after, replace_noise
        self.codes = nn.Parameter(torch.randn(num_heads, num_codes, d_model // num_heads))
        self.register_buffer("idle", torch.zeros(num_heads, num_codes, dtype=torch.long))
        self.bypassed = False
        self.changes: list[Change] = []
        self.watchers: list[Callable[[Tensor, Tensor, Tensor], None]] = []

    def heads(self, x: Tensor) -> Tensor:
        """Return the parts that have a codebook each, (B, T, D) -> (H, B * T, D / H)."""
        if x.ndim != 3 or x.shape[-1] != self.d_model or not x.is_floating_point():
            raise BadInput(f"x must be floating point (B, T, {self.d_model}), got {x.dtype} {tuple(x.shape)}")
        return torch.unflatten(x, -1, (self.num_heads, -1)).movedim(2, 0).flatten(1, 2)

    def choose(self, x: Tensor) -> Tensor:
        """Return the active codes in rising order, -1 for none; (B, T, D) -> (B, T, H k), head by head."""
        chosen = self._choose(self.heads(x), x.shape[0], x.shape[1])  # (H, B T, k)
        return torch.unflatten(chosen, 1, tuple(x.shape[:2])).movedim(0, 2).flatten(2)

    def _choose(self, heads: Tensor, batch: int, tokens: int) -> Tensor:
        where = [change.rows(batch, tokens, heads.device) for change in self.changes]
        found = []
        for start in range(0, max(heads.shape[1], 1), _CHUNK):
            near = nearness(heads[:, start : start + _CHUNK], self.codes, self.similarity)
            for change, rows in zip(self.changes, where, strict=True):
                if change.kind in ("force", "ablate"):
                    limit = float("inf" if change.kind == "force" else "-inf")
                    for head, codes in change.codes.items():
                        here = rows[start : start + _CHUNK, None] & _marked(codes, self.num_codes, rows.device)
                        near[head] = near[head].masked_fill(here, limit)
            found.append(near.argmax(-1, keepdim=True) if self.k == 1 else near.topk(self.k, -1).indices)
        chosen = torch.cat(found, 1)
        for change, rows in zip(self.changes, where, strict=True):
            chosen = _rewritten(chosen, change, rows)
        return chosen.sort(-1).values  # one order, so that equal sets give equal sums

    def quantize(self, chosen: Tensor) -> Tensor:
        """Return the sum or mean of codes, (H, M, k) -> (H, M, D / H), -1 counting as zeros."""
        rows = lookup(self.codes, chosen.clamp(min=0))  # (H, M, k, D / H)
        if self.changes:
            rows = rows * (chosen >= 0)[..., None]
        total = rows.sum(-2, dtype=torch.promote_types(rows.dtype, torch.float32))
        return (total / self.k if self.reduce == "mean" else total).to(rows.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Put the active codes in the place of ``x``."""
        heads = self.heads(x)
        if self.bypassed:
            for watch in self.watchers:
                watch(heads, heads, heads.new_zeros(*heads.shape[:2], 0, dtype=torch.long))
            return x
        if self.training and self.replace_after:
            self._replace_dead(heads)
        chosen = self._choose(heads, x.shape[0], x.shape[1])
        if self.training:
            self._count(chosen)
        quantized = self.quantize(chosen)
        for watch in self.watchers:
            watch(heads, quantized, chosen)
        y = straight_through(heads, quantized.to(x.dtype))
        return torch.unflatten(y, 1, tuple(x.shape[:2])).movedim(0, 2).flatten(2)

    @torch.no_grad()
    def _count(self, chosen: Tensor) -> None:
        self.idle.copy_(torch.where(times_active(chosen, self.num_codes) > 0, 0, self.idle + 1))

    @torch.no_grad()
    def _replace_dead(self, heads: Tensor) -> None:
        dead = self.idle >= self.replace_after
        if heads.shape[1] and bool(dead.any()):
            scale = self.k if self.reduce == "sum" else 1
            self.codes.copy_(reseeded(self.codes, dead, heads / scale, noise=self.replace_noise))
            self.idle.masked_fill_(dead, 0)

    @torch.no_grad()
    def start_(self, heads: Tensor, *, steps: int = 10, generator: torch.Generator | None = None) -> None:
        """Set the codes by k-means on activations, (H, M, D / H), over k where codes are summed."""
        scale = self.k if self.reduce == "sum" else 1
        found = [kmeans(rows, self.num_codes, steps=steps, generator=generator) for rows in heads]
        self.codes.copy_(torch.stack(found) / scale)

    def change(self, kind: Kind, codes: Codes, positions: Positions) -> Change:
        """Return an intervention here, its codes checked."""
        by_head = codes if isinstance(codes, Mapping) else {0: codes}
        if not isinstance(codes, Mapping) and self.num_heads > 1:
            raise BadInput(f"a site of {self.num_heads} codebooks needs codes as head -> codes, got {codes!r}")
        lists = {
            head: [given] if isinstance(given, int) else [int(c) for c in given] for head, given in by_head.items()
        }
        most = {"force": self.k, "ablate": self.num_codes - self.k}.get(kind, self.num_codes)
        for head, given in lists.items():
            if not 0 <= head < self.num_heads or any(not 0 <= code < self.num_codes for code in given):
                raise BadInput(
                    f"codes must be below {self.num_codes}, heads below {self.num_heads}, got {head}: {given}"
                )
            if len(given) > most:
                raise BadInput(f"at most {most} codes can be named here, got {len(given)}")
        return Change(kind, lists, positions)


@torch.no_grad()
def nearness(x: Tensor, codes: Tensor, similarity: Similarity) -> Tensor:
    """Return a number that ranks codes as their similarity does, (H, M, D), (H, N, D) -> (H, M, N).

    What all codes share is left out, since this runs at every site in every step. Float32 at least, under autocast too.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    x, codes = x.to(wide), codes.to(wide)
    with torch.autocast(x.device.type, enabled=False):
        if similarity == "cosine":
            return x @ nn.functional.normalize(codes, dim=-1).mT
        centre = codes.mean(-2, keepdim=True)  # differences do not depend on it, rounding does
        x, codes = x - centre, codes - centre
        return torch.baddbmm(-0.5 * codes.square().sum(-1)[:, None], x, codes.mT)


def times_active(chosen: Tensor, n: int) -> Tensor:
    """Return how often each of n codes is active, -1 standing for none; (H, M, k) -> (H, n)."""
    return usage(chosen + 1, n + 1, groups=1).counts[:, 1:]


def _marked(codes: list[int], n: int, device: torch.device) -> Tensor:
    mask = torch.zeros(n, dtype=torch.bool, device=device)
    mask[codes] = True
    return mask


def _rewritten(chosen: Tensor, change: Change, rows: Tensor) -> Tensor:
    """Return chosen codes (H, M, k) after an intervention that names what is there, not what is likely."""
    if change.kind == "silence":
        for head, codes in change.codes.items():
            gone = torch.isin(chosen[head], torch.tensor(codes, device=chosen.device)) & rows[:, None]
            chosen[head] = chosen[head].masked_fill(gone, -1)
    if change.kind == "activate":
        width = max(chosen.shape[-1], *(len(codes) for codes in change.codes.values()))
        chosen = nn.functional.pad(chosen, (0, width - chosen.shape[-1]), value=-1)
        for head, codes in change.codes.items():
            new = torch.tensor(codes + [-1] * (width - len(codes)), device=chosen.device)
            chosen[head] = torch.where(rows[:, None], new, chosen[head])
    return chosen
