"""Binary transformers whose attention is given back what binarisation took, by low-rank estimators of the residual.

`BiPFT: Binary Pre-trained Foundation Transformer with Low-rank Estimation of Binarization Residual Polynomials
<https://arxiv.org/abs/2312.08937>`_ (Xing et al., 2024), for one head, with Q = Q_b + Q_r and K = K_b + K_r:

    Q K^T = Q_b K_b^T + (Q_b K_r^T + Q_r K_b^T + Q_r K_r^T) ~ Q_b K_b^T + q_m k_p^T + q_p k_m^T + q_p k_p^T,

q_m = X M_q, q_p = X P_q, k_m = X M_k, k_p = X P_k (D -> R, shared by all heads); context = P_b V_b + P_b (X P_v 1^T).

Emulated: signs are floats, and bit operations are counted (:func:`bit_operations`), not timed. It is no lever of
``fit``: the binary network is pre-trained anew, which a recovery of minutes does not replace (the claim's stays near
chance), and no cost that ``fit`` measures would fall beyond what binary weights alone bring (``reste-estimator``).

Departures:
- The value residual has R scalars a token, the j-th added to the j-th of R equal slices of a head's channels; the
  released code has R = 1, one scalar for all.
- P_q, P_k and P_v start at 0, so that training begins at the plain binary attention.
- No learned shift stands before a sign, and no GELU between the two layers of a block, whose sign the next one takes
  anyway; the released code has both.
- ``binarize`` takes the weights of a full-precision model, and its ``pretrain`` is a distillation of that model's
  outputs; masked language modelling is :func:`mask_tokens` and :func:`masked_lm_loss` on a :class:`BinaryTransformer`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.models import Attention
from torchgraft.bench.task import Split
from torchgraft.bench.training import train
from torchgraft.catalogue import Card, Claim
from torchgraft.engines.binary.elastic import BinaryProjection, ElasticSign, ElasticUnit
from torchgraft.engines.surgery.swap import replace_module
from torchgraft.errors import BadInput

__all__ = [
    "CARD",
    "BinaryAttention",
    "BinaryTransformer",
    "Operations",
    "binarize",
    "bit_operations",
    "mask_tokens",
    "masked_lm_loss",
]

CARD = Card(
    key="bipft-residual-attention",
    title="Binary attention with low-rank estimators of its residual (BiPFT)",
    seed_id=160,
    authors="Xing et al., 2024",
    reference="https://arxiv.org/abs/2312.08937",
    family="shrink/quantize",
    kind="part",
    engine=("attention", "parametrize"),
    equation="S = (Q_b K_b^T + q_m k_p^T + q_p k_m^T + q_p k_p^T) / sqrt(K), o = P_b V_b + P_b (X P_v 1^T)",
    entry="BinaryAttention",
    declared={"parameters": "4 * (d_model**2 + d_model) + 6 + 5 * (d_model + 1) * rank"},
    example={"d_model": 8, "num_heads": 2, "rank": 1},
    shapes=((2, 5, 8),),
    oracles=(
        "with the exact residuals as estimators the four terms sum to Q K^T to 1e-5",
        "estimators of zero give the plain binary attention bit for bit",
        "the estimators add 5 (D + 1) R parameters; weights, queries, keys, values and probabilities take two values",
        "the gradient of a binarised activation is the upstream one where |x / alpha| <= 1, and 0 outside",
    ),
    claim=Claim(
        text="masked language modelling on the bytes of the standard library (D = 32, 2 heads, 2 layers), then telling"
        " from which of 6 packages 32 bytes come: binary with and without estimators, with and without pre-training",
        figure="estimators lower the masked-LM loss by >= 2 %, and pre-training lifts the accuracy of the binary model"
        " by >= 5 points over training from scratch; mean of 3 seeds",
    ),
    choose_when="a text encoder must have 1-bit weights and activations, and there is text to pre-train on",
    choose_instead="int8-dynamic or biper-binarization where activations may stay floats: they cost far less accuracy",
    expected_failures={
        "gradients-are-the-derivatives": "a sign's derivative is 0; the gradient is an estimate by definition",
    },
    bibtex="""@inproceedings{xing2024bipft,
  title={BiPFT: Binary Pre-trained Foundation Transformer with Low-rank Estimation of Binarization Residual
         Polynomials},
  author={Xing, Xingrun and Du, Li and Wang, Xinyuan and Zeng, Xianlin and Wang, Yequan and Zhang, Zheng and
          Zhang, Jiajun},
  booktitle={AAAI Conference on Artificial Intelligence},
  year={2024}
}""",
)


class _Estimator(nn.Linear):
    """A linear layer that computes in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class BinaryAttention(nn.Module):
    """Self-attention of binary weights and activations, with low-rank estimators of what binarisation leaves out.

    Args:
        d_model: width of the input and output.
        num_heads: heads; must divide ``d_model``.
        rank: of the estimators; 0 leaves them out.
        causal: whether a token sees only itself and those before it.

    Shapes:
        (B, T, D) -> (B, T, D)

    Example:
        >>> BinaryAttention(8, num_heads=2)(torch.randn(1, 3, 8)).shape
        torch.Size([1, 3, 8])

    Raises:
        BadInput: a size is wrong.
    """

    def __init__(self, d_model: int, *, num_heads: int = 2, rank: int = 1, causal: bool = False) -> None:
        super().__init__()
        if d_model < 1 or num_heads < 1 or d_model % num_heads:
            raise BadInput(f"num_heads must divide d_model, both at least 1, got {num_heads} and {d_model}")
        if rank < 0 or (rank and (d_model // num_heads) % rank):
            raise BadInput(f"rank must be 0 or divide the {d_model // num_heads} channels of a head, got {rank}")
        self.d_model, self.num_heads, self.rank, self.causal = d_model, num_heads, rank, causal
        self.inputs = ElasticSign()
        self.query, self.key, self.value = (BinaryProjection(d_model, d_model, quantise=False) for _ in range(3))
        self.out = BinaryProjection(d_model, d_model)
        self.query_sign, self.key_sign, self.value_sign = ElasticSign(), ElasticSign(), ElasticSign()
        self.probability = ElasticUnit()
        names = ("query_minor", "query_plus", "key_minor", "key_plus", "value_plus") if rank else ()
        self.estimators = nn.ModuleDict({name: _Estimator(d_model, rank) for name in names})
        for name, layer in self.estimators.items():
            if name.endswith("plus"):
                nn.init.zeros_(layer.weight)  # type: ignore[arg-type]  # a ModuleDict's values are typed as modules
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]  # as above

    def residual(self, x: Tensor) -> Tensor:
        """Return the estimated residual of the scores before scaling, (B, T, T), the same for all heads."""
        q_m, q_p, k_m, k_p = (
            self.estimators[name](x) for name in ("query_minor", "query_plus", "key_minor", "key_plus")
        )  # each (B, T, R)
        # q_m k_p^T + q_p k_m^T + q_p k_p^T as one product
        return torch.cat([q_m, q_p, q_p], -1) @ torch.cat([k_p, k_m, k_p], -1).transpose(1, 2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix tokens; ``mask`` (B, 1, 1, T) is True where a key may be seen."""
        if x.ndim != 3 or x.shape[-1] != self.d_model or not x.is_floating_point():
            raise BadInput(f"input must be floating-point (B, T, {self.d_model}), got {x.dtype} {tuple(x.shape)}")
        # In half precision rounding would turn signs over, and a turned sign is no small error.
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return self._mix(x.to(wide), mask).to(x.dtype)

    def _mix(self, x: Tensor, mask: Tensor | None) -> Tensor:
        signs = self.inputs(x)
        q, k, v = (
            torch.unflatten(made(layer(signs)), -1, (self.num_heads, -1)).transpose(1, 2)
            for layer, made in (
                (self.query, self.query_sign),
                (self.key, self.key_sign),
                (self.value, self.value_sign),
            )
        )  # each (B, H, T, K), two values
        scores = q @ k.transpose(-2, -1)
        if self.rank:
            scores = scores + self.residual(x)[:, None]
            each = self.estimators["value_plus"](x).repeat_interleave(v.shape[-1] // self.rank, -1)  # (B, T, K)
            v = v + each[:, None]
        scores = scores * v.shape[-1] ** -0.5
        if self.causal:
            later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(later, float("-inf"))
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        mixed = self.probability(scores.softmax(-1)) @ v  # (B, H, T, K)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out

    @classmethod
    def from_attention(cls, old: Attention, *, rank: int = 1) -> BinaryAttention:
        """Return a binary attention with the projections of ``old``."""
        width = old.query.in_features
        if old.num_heads * old.head_dim != width:
            raise BadInput(f"the heads of the attention must fill its width {width}; some have been cut")
        made = cls(width, num_heads=old.num_heads, rank=rank, causal=old.causal)
        for name in ("query", "key", "value", "out"):
            _inherit(getattr(made, name), getattr(old, name))
        return made.to(old.query.weight).train(old.training)


def _inherit(new: BinaryProjection, old: nn.Linear) -> BinaryProjection:
    with torch.no_grad():
        new.weight.copy_(old.weight)
        new.bias.zero_() if old.bias is None else new.bias.copy_(old.bias)
    return new


class _Block(nn.Module):
    def __init__(self, d_model: int, num_heads: int, rank: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.attn = BinaryAttention(d_model, num_heads=num_heads, rank=rank)
        self.fc1, self.fc2 = BinaryProjection(d_model, 4 * d_model), BinaryProjection(4 * d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attn(x))
        out: Tensor = self.norm2(x + self.fc2(self.fc1(x)))
        return out


class BinaryTransformer(nn.Module):
    """A text encoder with binary blocks; embeddings, norms, softmax and head stay in full precision.

    Args:
        vocabulary: number of symbols, a mask symbol included where there is one.
        context: the longest sequence.
        d_model: width.
        depth: blocks.
        num_heads: heads a block.
        rank: of the estimators; 0 is the plain binary transformer.
        classes: answers to a whole text; ``None`` gives logits of the symbol at every place.

    Shapes:
        (B, T) integers -> (B, T, vocabulary), or (B, classes)

    Example:
        >>> BinaryTransformer(10, 6, d_model=8, depth=1)(torch.zeros(2, 6, dtype=torch.long)).shape
        torch.Size([2, 6, 10])
    """

    def __init__(
        self,
        vocabulary: int,
        context: int,
        *,
        d_model: int = 64,
        depth: int = 2,
        num_heads: int = 2,
        rank: int = 1,
        classes: int | None = None,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, d_model)
        # Places as large as symbols: of two summands a sign shows the larger.
        self.position = nn.Parameter(torch.randn(1, context, d_model))
        self.norm = nn.LayerNorm(d_model)
        self.blocks = nn.Sequential(*(_Block(d_model, num_heads, rank) for _ in range(depth)))
        self.pooled = classes is not None
        self.head = nn.Linear(d_model, vocabulary if classes is None else classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits."""
        x = self.blocks(self.norm(self.embed(tokens) + self.position[:, : tokens.shape[1]]))
        logits: Tensor = self.head(x.mean(1) if self.pooled else x)
        return logits

    def classifier(self, classes: int) -> BinaryTransformer:
        """Return a copy that answers for whole texts, with a new head."""
        made = copy.deepcopy(self)
        made.pooled, made.head = True, nn.Linear(self.head.in_features, classes)
        return made


def mask_tokens(
    tokens: Tensor, mask: int, *, share: float = 0.15, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Return the tokens with ``share`` of them replaced by ``mask``, and where that is; at least one a text.

    Shapes:
        (B, T) -> (B, T) integers, (B, T) booleans
    """
    draw = torch.rand(tokens.shape, generator=generator)
    hidden = (draw < share) | (draw == draw.amin(-1, keepdim=True))
    return tokens.masked_fill(hidden, mask), hidden


def masked_lm_loss(model: nn.Module, tokens: Tensor, hidden: Tensor, seen: Tensor) -> Tensor:
    """Return the cross-entropy of the hidden tokens, from what ``model`` says to ``seen``."""
    return F.cross_entropy(model(seen)[hidden], tokens[hidden])


def binarize(
    model: nn.Module,
    inputs: Tensor | None = None,
    *,
    rank: int = 1,
    pretrain: bool = True,
    steps: int = 300,
    batch_size: int = 32,
    lr: float = 1e-3,
    seed: int = 0,
) -> nn.Module:
    """Return a copy of ``model`` whose blocks are binary: attention with estimators, linear layers beside it.

    Args:
        model: a transformer of :class:`torchgraft.bench.models.TransformerBlock`; left as it was.
        inputs: samples, without labels; needed to pre-train.
        rank: of the estimators.
        pretrain: whether the copy is trained to give the outputs of ``model`` on ``inputs``.
        steps, batch_size, lr, seed: of that training; the seed also makes the estimators.

    Raises:
        BadInput: the model has no such block, or there are no inputs to pre-train on.
    """
    made = copy.deepcopy(model)
    found = [(name, module) for name, module in made.named_modules() if isinstance(module, Attention)]
    if not found:
        raise BadInput(
            f"{type(model).__name__} has no attention of torchgraft.bench.models, which is what is made binary"
        )
    if pretrain and inputs is None:
        raise BadInput("pretrain needs inputs; give samples, or pretrain=False")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, module in found:
            path, _, leaf = name.rpartition(".")
            block = made.get_submodule(path)
            replace_module(made, name, BinaryAttention.from_attention(module, rank=rank))
            for other, layer in list(block.named_modules()):
                if type(layer) is nn.Linear and not other.startswith(f"{leaf}."):
                    new = BinaryProjection(layer.in_features, layer.out_features).to(layer.weight)
                    replace_module(block, other, _inherit(new, layer).train(layer.training))
    if pretrain and inputs is not None:
        teacher, modes = copy.deepcopy(model).eval(), made.training

        def loss(student: nn.Module, seen: Any, target: Tensor, rows: Tensor) -> Tensor:
            with torch.no_grad():
                wanted = teacher(seen)
            return F.mse_loss(student(seen), wanted)

        split = Split(inputs, torch.zeros(len(inputs)))
        train(made, split, loss, steps=steps, batch_size=batch_size, lr=lr, seed=seed)
        made.train(modes)
    return made


@dataclass(frozen=True)
class Operations:
    """Multiplications of one text, counted.

    Args:
        full: what they would all be in full precision.
        binary: those of two two-valued numbers.
        floating: those that remain in full precision.
    """

    full: int
    binary: int
    floating: int

    @property
    def saving(self) -> float:
        """full / (floating + binary / 64), a 64-bit word holding 64 binary ones."""
        return self.full / (self.floating + self.binary / 64)


def bit_operations(
    d_model: int, tokens: int, *, num_heads: int = 2, rank: int = 1, hidden: int | None = None
) -> Operations:
    """Return the multiplications of one block: four projections, two attention products, two layers of ``hidden``.

    Scales, of which there is one an output, are not counted, in full precision neither.

    Args:
        d_model: width.
        tokens: T.
        num_heads: heads; they share the estimated scores, but each has probabilities of its own, by which it multiplies
            the estimated values.
        rank: of the estimators, whose products stay in full precision.
        hidden: width between the two layers; by default 4 D, and 0 for attention alone.

    Example:
        >>> bit_operations(768, 128).saving > 40
        True
    """
    between = 4 * d_model if hidden is None else hidden
    binary = tokens * d_model * (4 * d_model + 2 * between) + 2 * tokens**2 * d_model
    floating = 5 * tokens * d_model * rank + (3 + num_heads) * tokens**2 * rank
    return Operations(binary, binary, floating)
