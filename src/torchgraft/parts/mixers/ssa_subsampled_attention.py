"""Softmax attention that sees a random part of its sources in training, all of them in use.

`The Information Pathways Hypothesis: Transformers are Dynamic Self-Ensembles <https://arxiv.org/abs/2306.01705>`_
(Hussain, Zaki and Subramanian, 2023): o_i = sum_{j in S} softmax_{j in S}(q_i . k_j / sqrt(K)) v_j, S a random subset
of keep T sources, or a window of keep T of the order argsort_j(j + sigma eps_j); queries are never sampled.

Departures: the abstract was at hand, not the paper's code. That one subset serves all heads and queries of a layer (and
of a batch, unless ``per`` says otherwise), the noise in the local order, and that a causal query always sees itself,
are our reading. Windows go with blocks of queries half as long as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from torchgraft.bench.task import Inputs, call
from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.engines.attention import Mask, attend
from torchgraft.engines.attention.mixer import AttentionMixer
from torchgraft.engines.attention.sampled import attend_to_sources, check_sampling, draw_sources, pairs_seen
from torchgraft.errors import BadInput

__all__ = ["CARD", "SubsampledAttention", "attention", "self_ensemble", "subsampled_training"]

#: Whether one subset serves the whole layer, one each sequence, or one each head of keys of each sequence.
Per: TypeAlias = Literal["layer", "sample", "head"]

CARD = Card(
    key="ssa-subsampled-attention",
    title="Stochastically subsampled self-attention (SSA)",
    seed_id=54,
    authors="Hussain, Zaki and Subramanian, 2023",
    reference="https://arxiv.org/abs/2306.01705",
    family="parts/mixers",
    kind="part",
    engine=("attention",),
    equation="o_i = sum_{j in S} softmax_{j in S}(q_i . k_j / sqrt(K)) v_j,  |S| = keep T, S drawn anew at every step",
    entry="SubsampledAttention",
    capabilities=frozenset({"causal", "stateful", "attention-interface"}),
    declared={"parameters": "4*d_model**2"},
    example={"d_model": 16, "num_heads": 2},
    shapes=((2, 12, 16),),
    oracles=(
        "equals softmax in eval mode",
        "keep = 1 equals dense attention in training too",
        "for any subset the output equals dense attention with all other sources hidden, outputs and gradients",
        "over all 20 subsets of 3 of 6 sources, the mean of the sums of e^s v and of e^s, times 2, is the dense sum",
        "with sigma = 0 the local form is attention within sliding windows, written out as a mask",
        "the scores are T (keep T + 1) numbers",
    ),
    claim=Claim(
        text="Bytes of 200 kB of the standard library, three layers of width 96, context 128: a quarter of the "
        "sources, near ones rather than far ones, for 90 % of the steps and all of them for the last 10 %, beside "
        "dense training; and the mean of eight subsampled passes of the model before its dense steps.",
        figure="held-out loss <= 1.015 of dense training's, score products in training 4x fewer (>= 3.8x with the "
        "query's own), and eight passes together better than one",
    ),
    choose_when="attention is what training costs, or a transformer overfits its data; nothing changes in use",
    choose_instead="plain attention where sequences are short: gathering keys then costs more than it saves",
    confidence="medium",
    bibtex="""@inproceedings{hussain2023information,
  title={The Information Pathways Hypothesis: Transformers are Dynamic Self-Ensembles},
  author={Hussain, Md Shamim and Zaki, Mohammed J. and Subramanian, Dharmashankar},
  booktitle={ACM SIGKDD Conference on Knowledge Discovery and Data Mining},
  year={2023}
}""",
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    training: bool = False,
    keep: float = 0.25,
    bias: Literal["uniform", "local"] = "uniform",
    sigma: float | None = None,
    per: Per = "layer",
    sources: Tensor | None = None,
) -> Tensor:
    """Return what softmax weights mix: of all sources, or in training of some.

    Args:
        q: queries, the last T of S tokens.
        k: keys.
        v: values.
        mask: who sees whom; in training written out for all pairs unless it is of padding.
        causal: whether a query sees sources up to its own position only; it then always sees itself.
        scale: by default 1 / sqrt(K).
        training: whether sources are sampled.
        keep: share of the sources that is kept.
        bias: ``"uniform"`` or ``"local"``, see :func:`torchgraft.engines.attention.sampled.draw_sources`.
        sigma: of the local bias.
        per: what gets a subset of its own.
        sources: the subset, (1 or B, P, m), instead of a draw; P blocks of equal numbers of queries, the last may be
            shorter.

    Shapes:
        (B, T, H, K), (B, S, G, K), (B, S, G, V) -> (B, T, H, V)

    Example:
        >>> q = torch.randn(1, 8, 2, 4)
        >>> attention(q, q, q, causal=True, training=True).shape
        torch.Size([1, 8, 2, 4])

    Raises:
        BadInput: a setting is out of range.
    """
    if per not in ("layer", "sample", "head"):
        raise BadInput(f"per must be 'layer', 'sample' or 'head', got {per!r}")
    if not training or (keep == 1.0 and sources is None):
        return attend(q, k, v, mask=mask, causal=causal, scale=scale)
    batch, _, heads = q.shape[:3]
    if per == "head" and sources is None and k.shape[2] > 1:  # every head of keys as a sequence of its own
        q_, k_, v_ = (torch.unflatten(x, 2, (k.shape[2], -1)).transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        pairs = pairs_seen(mask, q, k)
        if pairs is not None:
            pairs = torch.unflatten(pairs.expand(batch, heads, -1, -1), 1, (k.shape[2], -1)).flatten(0, 1)
        mixed = attention(
            q_,
            k_,
            v_,
            mask=pairs,
            causal=causal,
            scale=scale,
            training=True,
            keep=keep,
            bias=bias,
            sigma=sigma,
            per="sample",
        )  # (B G, T, H / G, V)
        return torch.unflatten(mixed, 0, (batch, -1)).transpose(1, 2).flatten(2, 3)
    if sources is None:
        rows = 1 if per == "layer" else batch
        sources = draw_sources(k.shape[1], keep=keep, bias=bias, sigma=sigma, rows=rows, causal=causal, device=k.device)
    return attend_to_sources(q, k, v, sources, seen=pairs_seen(mask, q, k), causal=causal, scale=scale)


class SubsampledAttention(AttentionMixer):
    """Multi-head softmax attention that sees ``keep`` of its sources in training mode, and all in eval mode.

    Subsets come from torch's generator, anew at every pass. ``keep`` may be changed at any time.

    Args:
        d_model: the width D.
        num_heads: H; divides ``d_model``.
        num_kv_heads: heads of keys and values; by default H.
        rotary: whether queries and keys are turned by their position.
        causal: whether a token sees itself and those before it only.
        keep: share of the sources that is kept in training.
        bias: ``"uniform"``, or ``"local"`` for near sources rather than far ones.
        sigma: in tokens, how far the local bias reaches beyond its window; by default half the window.
        per: what gets a subset of its own: ``"layer"``, ``"sample"`` or ``"head"``.

    Shapes:
        (B, T, D) -> (B, T, D)

    Example:
        >>> SubsampledAttention(8, num_heads=2).train()(torch.randn(1, 12, 8)).shape
        torch.Size([1, 12, 8])

    Raises:
        BadInput: heads do not divide the width, or a setting is out of range.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        rotary: bool = True,
        causal: bool = True,
        keep: float = 0.25,
        bias: Literal["uniform", "local"] = "uniform",
        sigma: float | None = None,
        per: Per = "layer",
    ) -> None:
        super().__init__(d_model, num_heads=num_heads, num_kv_heads=num_kv_heads, rotary=rotary, causal=causal)
        check_sampling(keep, bias, sigma)
        if per not in ("layer", "sample", "head"):
            raise BadInput(f"per must be 'layer', 'sample' or 'head', got {per!r}")
        self.keep, self.bias, self.sigma, self.per = keep, bias, sigma, per

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return what the sources of this pass give."""
        return attention(
            q,
            k,
            v,
            causal=self.causal,
            training=self.training,
            keep=self.keep,
            bias=self.bias,
            sigma=self.sigma,
            per=self.per,
        )


def _layers(model: nn.Module) -> list[SubsampledAttention]:
    found = [module for module in model.modules() if isinstance(module, SubsampledAttention)]
    if not found:
        raise BadInput("the model has no SubsampledAttention; put some in by torchgraft.swap")
    return found


def subsampled_training(
    model: nn.Module, steps: int, *, keep: float = 0.25, finetune_frac: float = 0.1
) -> Callable[[int, float], None]:
    """Sample the sources of ``model`` from now on; the function returned ends that for the last steps.

    Args:
        model: a model with :class:`SubsampledAttention` in it.
        steps: optimiser steps of the training.
        keep: share of the sources that is kept at first.
        finetune_frac: share of the steps, the last ones, in which all sources are seen.

    Returns:
        A function of the number of steps done and the loss, to be called after every step, such as ``on_step`` of
        :func:`torchgraft.bench.training.train`.

    Example:
        >>> mixer = SubsampledAttention(8)
        >>> done = subsampled_training(mixer, 10, keep=0.5, finetune_frac=0.2)
        >>> shares = []
        >>> for step in range(1, 11):
        ...     shares.append(mixer.keep)
        ...     done(step, 0.0)
        >>> shares
        [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 1.0, 1.0]

    Raises:
        BadInput: the model has no such layer, or a share is out of range.
    """
    layers = _layers(model)
    check_sampling(keep)
    if steps < 1 or not 0.0 <= finetune_frac <= 1.0:
        raise BadInput(f"steps must be at least 1 and finetune_frac in [0, 1], got {steps} and {finetune_frac}")
    dense_from = steps - round(finetune_frac * steps)

    def done(step: int, loss: float) -> None:
        for layer in layers:
            layer.keep = keep if step < dense_from else 1.0

    done(0, 0.0)
    return done


@contextmanager
def _sampling(layers: list[SubsampledAttention], keep: float | None) -> Iterator[None]:
    before = [(layer.training, layer.keep) for layer in layers]
    try:
        for layer in layers:
            layer.training = True
            layer.keep = layer.keep if keep is None else keep
        yield
    finally:
        for layer, (mode, share) in zip(layers, before, strict=True):
            layer.training, layer.keep = mode, share


def self_ensemble(model: nn.Module, inputs: Inputs, *, n: int = 8, keep: float | None = None, seed: int = 0) -> Tensor:
    """Return the mean of the probabilities of ``n`` subsampled passes; all else is as in the model's present mode.

    Args:
        model: a model with :class:`SubsampledAttention` in it whose output is logits.
        inputs: what it takes.
        n: number of passes.
        keep: share of the sources that is kept; by default each layer's own.
        seed: decides the subsets; torch's generator is left as it was.

    Shapes:
        logits (..., C) -> probabilities (..., C)

    Raises:
        BadInput: the model has no such layer, ``n`` is below 1 or ``keep`` out of range.
    """
    layers = _layers(model)
    if n < 1:
        raise BadInput(f"n must be at least 1, got {n}")
    check_sampling(1.0 if keep is None else keep)
    anchor = layers[0].out.weight.device
    with torch.no_grad(), torch.random.fork_rng(devices=[anchor] if anchor.type == "cuda" else []):
        torch.manual_seed(seed)
        with _sampling(layers, keep):
            total = sum(_probabilities(call(model, inputs)) for _ in range(n))
    return torch.as_tensor(total) / n


def _probabilities(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
