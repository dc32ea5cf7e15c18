"""The aspect ratio of a transformer: few layers of many heads beside many layers of few, with as many heads in all.

`Wide Attention Is The Way Forward For Transformers? <https://arxiv.org/abs/2210.00640>`_ (Brown et al., 2022) keeps the
product of layers L and heads a layer H at a constant A, and the size of a head, the width and the hidden width fixed.

Equation: ``x <- x + W_O concat_h Attn_h(LN x), x <- x + FFN(LN x)`` in each of L layers, L H = A

Departures: of the paper's ten attentions (``ATTENTIONS``) the claim runs two, softmax and the linear one with features
elu + 1; what the other eight leave out is said in ``aspect_attentions``. Projections of attentions have no bias, so
that their number of parameters is the same for every member of a family, and tokens are pooled by their maximum, which
a miniature learns from sooner than from a first token. The surgery that merges the layers of a trained model is ours: a
wide layer is exactly the sum of narrow ones on the same input, and trained layers do not read the same input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.meters import interleaved, memory, params
from torchgraft.bench.models import Attention, FeedForward
from torchgraft.bench.task import Inputs, Task, call, take
from torchgraft.bench.training import supervised, train
from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.engines.depth import stacks
from torchgraft.engines.residual import Widen, obstacle
from torchgraft.engines.residual.parallel import calls, checked_spans
from torchgraft.engines.surgery.edits import apply_edits
from torchgraft.errors import BadInput, nearest
from torchgraft.parts.blocks.aspect_attentions import (
    AspectAttention,
    BigBirdAttention,
    LinformerAttention,
    LocalAttention,
    LongformerAttention,
    PerformerAttention,
    SinkhornAttention,
    SparseAttention,
    SynthesizerAttention,
    mixed_by_features,
)

__all__ = [
    "ATTENTIONS",
    "CARD",
    "AspectRow",
    "LinearAttention",
    "WideEncoder",
    "aspect_ratio_family",
    "compare_aspect",
    "merge_layers",
]

CARD = Card(
    key="wide-attention",
    title="Wide attention: the aspect ratio of a transformer",
    seed_id=206,
    authors="Brown, Zhao, Shumailov and Mullins, 2022",
    reference="https://arxiv.org/abs/2210.00640",
    family="parts/blocks",
    kind="analysis",
    engine=("attention", "surgery"),
    equation="x <- x + W_O concat_{h <= A/L} Attn_h(LN x); x <- x + FFN(LN x), L times",
    entry="compare_aspect",
    oracles=(
        "attentions have 4 d_model A d_head parameters for every L, and A times what a head has of its own (Linformer "
        "2 R context, Sinkhorn d_head a block, Synthesizer d_head context in the place of its keys); from L layers to "
        "1 the total falls by (L - 1)(2 d_model d_ff + d_ff + d_model) and two norms a layer, exactly",
        "the sum over heads of W_O^(h) o_h equals the concatenated projection, and a wide layer of the heads of two "
        "narrow ones their summed outputs on the same input, to 1e-12 in float64, all ten types",
        "each sparse or approximate type at its limit is softmax attention: a window over all, Linformer with the "
        "identity, Performer over many features, Sinkhorn with one block; Synthesizer's weights see no other token",
        "merged layers of a model compute the sums of their parts on the same input",
    ),
    claim=Claim(
        text="256-byte chunks of the standard library's source into six packages; A = 8 heads of 16, d_model 64: 4 x 2 "
        "beside 2 x 4 and 1 x 8 at equal steps, softmax and linear; induction, which one layer cannot do, as the "
        "counter-example.",
        figure="1 x 8 at most 1 point below 4 x 2, at most 60 % of its parameters, at least 1.8x lower latency at "
        "batch 1; for softmax",
    ),
    choose_when="A small encoder is trained from scratch for a task that one look at the input can settle.",
    choose_instead="a deep model for language modelling, recall and anything that needs two steps of attention.",
    confidence="medium",
    bibtex="@article{brown2022wide, title={Wide Attention Is The Way Forward For Transformers?}, author={Brown, Jason "
    "Ross and Zhao, Yiren and Shumailov, Ilia and Mullins, Robert D.}, journal={arXiv preprint arXiv:2210.00640}, "
    "year={2022}}",
)


def _sized(attention: Attention, d_model: int, num_heads: int, d_head: int) -> Attention:
    """Give an attention heads of a size of their own, without biases."""
    attention.head_dim = d_head
    for name in ("query", "key", "value"):
        setattr(attention, name, nn.Linear(d_model, num_heads * d_head, bias=False))
    attention.out = nn.Linear(num_heads * d_head, d_model, bias=False)
    return attention


class LinearAttention(Attention):
    """Attention with phi(q) . phi(k) in the place of exp(q . k / sqrt(K)), phi = elu + 1: (B, T, D) -> (B, T, D)."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix tokens; ``mask`` (B, 1, 1, T) is True where a key may be seen."""
        parts = (part(x) for part in (self.query, self.key, self.value))
        q, k, v = (torch.unflatten(part, -1, (self.num_heads, -1)).transpose(1, 2) for part in parts)  # (B, H, T, K)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        if mask is not None:
            k = k * mask.transpose(-1, -2)
        y = mixed_by_features(q, k, v, causal=self.causal)
        mixed: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return mixed


ATTENTIONS: dict[str, type[Attention]] = {
    "softmax": Attention,
    "linear": LinearAttention,
    "local": LocalAttention,
    "longformer": LongformerAttention,
    "bigbird": BigBirdAttention,
    "sparse": SparseAttention,
    "linformer": LinformerAttention,
    "performer": PerformerAttention,
    "sinkhorn": SinkhornAttention,
    "synthesizer": SynthesizerAttention,
}


class _Layer(nn.Module):
    """Pre-norm attention whose heads need not fill the width, and a feed-forward part."""

    def __init__(
        self, d_model: int, num_heads: int, d_head: int, d_ff: int, kind: str, causal: bool, context: int
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(d_model)
        self.attn = _sized(ATTENTIONS[kind](d_model, 1, causal=causal), d_model, num_heads, d_head)
        self.attn.num_heads = num_heads
        if isinstance(self.attn, AspectAttention):
            self.attn.prepare(context)
        self.norm2 = nn.LayerNorm(d_model)
        self.mlp = FeedForward(d_model, d_ff)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class WideEncoder(nn.Module):
    """A transformer of ``layers`` layers of ``num_heads`` heads of size ``d_head``, over symbols.

    Args:
        layers: L.
        num_heads: H, heads a layer.
        d_model: the width D.
        d_head: size K of a head; H K need not equal D.
        d_ff: hidden width of the feed-forward parts.
        attention: one of ``ATTENTIONS``: ``"softmax"``, ``"linear"``, ``"local"``, ``"longformer"``, ``"bigbird"``,
            ``"sparse"``, ``"linformer"``, ``"performer"``, ``"sinkhorn"`` or ``"synthesizer"``.
        vocabulary: number of symbols.
        context: the longest sequence.
        classes: number of answers.
        causal: whether a token sees itself and those before it only, with one answer a token; else one a sequence, from
            the maximum over its tokens.
        spread: standard deviation of the initial positions.

    Shapes:
        (B, T) integers -> (B, classes), or (B, T, classes) where causal

    Example:
        >>> WideEncoder(1, 8, d_model=16, classes=3)(torch.zeros(2, 5, dtype=torch.long)).shape
        torch.Size([2, 3])

    Raises:
        BadInput: a size is below 1, or the attention is unknown or has no causal form.
    """

    def __init__(
        self,
        layers: int,
        num_heads: int,
        *,
        d_model: int = 64,
        d_head: int = 16,
        d_ff: int = 256,
        attention: str = "softmax",
        vocabulary: int = 256,
        context: int = 256,
        classes: int = 2,
        causal: bool = False,
        spread: float = 0.1,
    ) -> None:
        super().__init__()
        sizes = {"layers": layers, "num_heads": num_heads, "d_model": d_model, "d_head": d_head, "d_ff": d_ff}
        for name, value in {**sizes, "vocabulary": vocabulary, "context": context, "classes": classes}.items():
            if value < 1:
                raise BadInput(f"{name} must be at least 1, got {value}")
        if attention not in ATTENTIONS:
            known = list(ATTENTIONS)
            raise BadInput(f"attention must be one of {known}, got {attention!r}{nearest(attention, known)}")
        two_ways = getattr(ATTENTIONS[attention], "two_ways", "")
        if causal and two_ways:
            raise BadInput(f"attention {attention!r} has no causal form: {two_ways}; causal must be False")
        self.num_heads, self.causal = num_heads, causal
        self.embed = nn.Embedding(vocabulary, d_model)
        self.position = nn.Parameter(torch.randn(1, context, d_model) * spread)
        self.layers = nn.ModuleList(
            _Layer(d_model, num_heads, d_head, d_ff, attention, causal, context) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits."""
        if tokens.ndim != 2 or tokens.is_floating_point() or tokens.shape[1] > self.position.shape[1]:
            wanted = f"(B, T) with T <= {self.position.shape[1]}"
            raise BadInput(f"tokens must be integers of shape {wanted}, got {tokens.dtype} {tuple(tokens.shape)}")
        x = self.embed(tokens) + self.position[:, : tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x) if self.causal else self.norm(x).amax(1))
        return logits


def aspect_ratio_family(
    total_heads: int,
    *,
    d_model: int = 64,
    d_head: int = 16,
    d_ff: int = 256,
    attention: str = "softmax",
    vocabulary: int = 256,
    context: int = 256,
    classes: int = 2,
    causal: bool = False,
    spread: float = 0.1,
) -> list[WideEncoder]:
    """Return an encoder for every way to share ``total_heads`` heads evenly among layers, the deepest first.

    Args:
        total_heads: A = L H.
        d_model, d_head, d_ff, attention, vocabulary, context, classes, causal, spread: as for :class:`WideEncoder`.

    Example:
        >>> [(len(model.layers), model.num_heads) for model in aspect_ratio_family(4, d_model=8, d_head=2)]
        [(4, 1), (2, 2), (1, 4)]

    Raises:
        BadInput: there are no heads.
    """
    if total_heads < 1:
        raise BadInput(f"total_heads must be at least 1, got {total_heads}")
    return [
        WideEncoder(
            layers,
            total_heads // layers,
            d_model=d_model,
            d_head=d_head,
            d_ff=d_ff,
            attention=attention,
            vocabulary=vocabulary,
            context=context,
            classes=classes,
            causal=causal,
            spread=spread,
        )
        for layers in range(total_heads, 0, -1)
        if total_heads % layers == 0
    ]


@dataclass(frozen=True)
class AspectRow:
    """One member of a family.

    Args:
        layers: L.
        heads: H a layer.
        score: mean score on the task's test split.
        parameters: of the whole model.
        memory: peak bytes of a forward pass on one sample.
        latency: seconds of a forward pass on one sample, the median of the rounds.
        speedup: latency of the first member over this one's, the median over rounds in which they took turns.
    """

    layers: int
    heads: int
    score: float
    parameters: int
    memory: int
    latency: float
    speedup: float


def compare_aspect(
    models: Sequence[WideEncoder],
    task: Task,
    *,
    steps: int = 300,
    lr: float = 1e-3,
    batch_size: int = 32,
    seed: int = 0,
    rounds: int = 10,
) -> list[AspectRow]:
    """Train every member of a family alike, in place, and return what each one reaches and costs.

    Args:
        models: the members, such as those of :func:`aspect_ratio_family`; the first is what the others are held to.
        task: data, loss and score; its own model plays no part.
        steps: optimiser steps of each; 0 leaves the models as they are.
        lr: AdamW's highest learning rate.
        batch_size: samples a step.
        seed: of the order of the data.
        rounds: rounds of the measurement of latency.

    Example:
        >>> from torchgraft.bench.task import Split
        >>> data = Split(torch.zeros(4, 5, dtype=torch.long), torch.zeros(4, dtype=torch.long))
        >>> task = Task(nn.Identity(), data, data, data, F.cross_entropy, lambda out, t: (out.argmax(-1) == t).float())
        >>> rows = compare_aspect(aspect_ratio_family(2, d_model=8, d_head=4, d_ff=8), task, steps=0, rounds=1)
        >>> [(row.layers, row.heads, row.parameters) for row in rows]
        [(2, 1, 4738), (1, 2, 4562)]

    Raises:
        BadInput: there are no models.
    """
    if not models:
        raise BadInput("models must hold at least one encoder")
    for model in models:
        if steps:
            train(model, task.train, supervised(task.loss), steps=steps, batch_size=batch_size, lr=lr, seed=seed)
        model.eval()
    one = take(task.test.inputs, slice(1))
    seconds = interleaved(list(models), one, rounds=rounds)
    found = []
    for place, model in enumerate(models):
        with torch.no_grad():
            scores = [task.score(call(model, x), y) for x, y in task.test.batches(task.batch_size)]
        found.append(
            AspectRow(
                layers=len(model.layers),
                heads=model.num_heads,
                score=float(torch.cat(scores).mean()),
                parameters=params(model),
                memory=memory(model, one),
                latency=float(median(seconds[:, place])),
                speedup=float(median(seconds[:, 0] / seconds[:, place])),
            )
        )
    return found


def merge_layers(
    model: nn.Module, span: tuple[int, int] | None = None, *, example: Inputs, name: str | None = None
) -> nn.Module:
    """Return a copy of ``model`` in which a span of transformer layers is one layer with all their heads.

    Works on every model whose layers are known to :func:`torchgraft.engines.residual.widened`: those of this library,
    ``nn.TransformerEncoder`` with ``norm_first``, and GPT-2, Llama and ViT of transformers.

    Args:
        model: the model.
        span: (first, length) within its longest stack; default all of it.
        example: inputs for the model, by which its layers are found.
        name: which container; default that of the longest stack.

    Example:
        >>> model = WideEncoder(4, 2, d_model=16, d_head=4)
        >>> wide = merge_layers(model, (1, 3), example=torch.zeros(1, 5, dtype=torch.long))
        >>> [layer.attn.num_heads for layer in wide.layers]
        [2, 6]

    Raises:
        BadInput: there is no such stack, or its layers cannot be merged, with the reason.
    """
    found = [stack for stack in stacks(model, example) if name is None or stack.name == name]
    if not found:
        raise BadInput(f"{type(model).__name__} has no stack of layers {'' if name is None else f'named {name!r}'}")
    stack = max(found, key=lambda each: each.length)
    first, length = (0, stack.length) if span is None else span
    checked_spans([(first, length)], stack.length, stack.name)
    given: Mapping[str, object] = calls(model, stack.blocks, example)
    for block in stack.blocks[first : first + length]:
        args, kwargs = given[block][0]  # type: ignore[index]  # what the block was called with first
        why = obstacle(model.get_submodule(block), args, kwargs)
        if why is not None:
            raise BadInput(f"{block!r} cannot be merged with its neighbours: {why}")
    return apply_edits(model, [Widen(name=stack.name, size=stack.size, spans=((stack.first + first, length),))])
