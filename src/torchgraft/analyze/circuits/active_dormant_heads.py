"""Heads that work on some inputs and sleep on others, and the extreme tokens on which they sleep.

`Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token Phenomena in LLMs
<https://arxiv.org/abs/2410.13835>`_ (Guo et al., 2024). On the Bigram-Backcopy task a token after a trigger repeats the
token before it, and any other token follows a bigram law. A head that copies is needed on triggers only; elsewhere it
gives its weight to the first token, whose value it keeps near zero, since a softmax cannot give weight to nothing.

Equation: ``sink = mean_t A_{t,0}, drain = |v_0| / mean_{s>0} |v_s|, peak = |h_0| / mean_{s>0} |h_s|``

Departures: the mean of the sink leaves t = 0 out, which sees only itself; ReLU attention is not divided by t; bigrams
are of bytes of the standard library, not of Shakespeare; initial tokens follow frequencies without the triggers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.analyze.circuits.backcopy import BackcopyTransformer, BigramBackcopy, hand_built
from torchgraft.bench.meters.forward import resting
from torchgraft.bench.task import Inputs, call
from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.engines import taps
from torchgraft.engines.attention_maps import attention_maps, without_heads
from torchgraft.errors import BadInput

__all__ = [
    "CARD",
    "BackcopyTransformer",
    "BigramBackcopy",
    "ExtremeTokens",
    "extreme_token_report",
    "hand_built",
    "head_dormancy",
]

CARD = Card(
    key="active-dormant-heads",
    title="Active and dormant attention heads, extreme tokens",
    seed_id=35,
    authors="Guo, Pai, Bai, Jiao, Jordan and Mei, 2024",
    reference="https://arxiv.org/abs/2410.13835",
    family="analyze/circuits",
    kind="analysis",
    engine=("attention", "taps"),
    equation="sink = mean_t A_{t,0}; drain = |v_0| / mean_{s>0} |v_s|; peak = |h_0| / mean_{s>0} |h_s|",
    entry="extreme_token_report",
    oracles=(
        "every token after a trigger equals the token before it, and other transitions match P (chi-square)",
        "a transformer of one layer, built by hand, is within 0.01 nats of the best possible loss, the mean entropy of "
        "P over non-triggers; its head is a sink on non-triggers and none on triggers",
        "where A_{t,0} = 1 and v_0 = 0, ablating the head leaves the logits bit-identical",
        "ReLU attention with negative scores gives exactly zero",
        "the report equals attentions that GPT-2 and Llama of transformers return themselves, eager and fused",
    ),
    claim=Claim(
        text="One layer, one head, width 64 on Bigram-Backcopy with 3 triggers, 32 symbols, length 64, Adam, 1500 "
        "steps: softmax beside ReLU attention; residual peaks of 3 layers under Adam and SGD are reported, not gated.",
        figure="softmax: sink >= 0.8 on non-triggers and <= 0.2 on triggers, value ratio <= 0.3; ReLU: sink <= 0.1 at "
        "a loss within 0.02 of softmax's",
    ),
    choose_when="A model is to be quantised or cut and one wants to know which heads and tokens are extreme.",
    choose_instead="attribution where the question is which input decided, not which head was awake.",
    bibtex="@article{guo2024active, title={Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token "
    "Phenomena in {LLM}s}, author={Guo, Tianyu and Pai, Druv and Bai, Yu and Jiao, Jiantao and Jordan, Michael I. and "
    "Mei, Song}, journal={arXiv preprint arXiv:2410.13835}, year={2024}}",
)


@dataclass(frozen=True)
class ExtremeTokens:
    """How extreme the sink token is.

    Args:
        sink: mean weight that each head gives to it, (L, H).
        value: the norm of its value over the mean of the other tokens', (L, H); small is a drain.
        residual: the norm of its hidden state after each block over the mean of the others', (L'); large is a peak.
    """

    sink: Tensor
    value: Tensor
    residual: Tensor


def _block_names(model: nn.Module) -> list[str]:
    """Return the members of the outermost lists of modules."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return [f"{name}.{index}" for name in outer for index in range(len(model.get_submodule(name)))]  # type: ignore[arg-type]


def _ratio(norms: Tensor, sink: int) -> Tensor:
    """Return the norm of the sink token over the mean of the others, (..., T) -> (...)."""
    others = torch.cat([norms[..., :sink], norms[..., sink + 1 :]], -1)
    return norms[..., sink] / others.mean(-1).clamp(min=1e-12)


def extreme_token_report(
    model: nn.Module, batch: Inputs, *, sink: int = 0, where: Tensor | None = None
) -> ExtremeTokens:
    """Return how much weight each head gives to the sink token, and how extreme its values and states are.

    Args:
        model: a transformer of this library, of torch (converted) or of transformers, eager or fused; left as it was.
        batch: its inputs.
        sink: place of the token in question.
        where: which queries count for the sink, (B, T); default all that stand after it.

    Example:
        >>> from torchgraft.bench.models import ByteTransformer
        >>> found = extreme_token_report(ByteTransformer(16, 8, d_model=8, depth=3, num_heads=2), torch.arange(8)[None])
        >>> found.sink.shape, found.residual.shape
        (torch.Size([3, 2]), torch.Size([3]))

    Raises:
        BadInput: the model has no attention that can be seen, or no query counts.
    """
    names = _block_names(model)
    with resting(model), torch.no_grad(), attention_maps(model) as seen, taps.record(model, names) as states:
        call(model, batch)
    if not seen:
        raise BadInput(f"{type(model).__name__} shows no softmax or ReLU attention")
    B, _, T, _ = seen[0].weights.shape
    counted = (torch.arange(T) > sink).expand(B, T) if where is None else where
    if counted.shape != (B, T) or not bool(counted.any()):
        raise BadInput(
            f"where must choose among the {(B, T)} tokens, got {tuple(counted.shape)}, {int(counted.sum())} chosen"
        )
    if not 0 <= sink < T - 1:
        raise BadInput(f"sink must lie before the last of {T} tokens, got {sink}")
    residual = []
    for name in names:
        value = states.get(name)
        hidden = value[0] if isinstance(value, tuple | list) else value
        if isinstance(hidden, Tensor) and hidden.ndim == 3 and hidden.shape[:2] == (B, T):
            residual.append(_ratio(hidden.float().norm(dim=-1), sink).mean())
    return ExtremeTokens(
        sink=torch.stack([each.weights[..., sink].transpose(1, 2)[counted].float().mean(0) for each in seen]),
        value=torch.stack([_ratio(each.values.float().norm(dim=-1), sink).mean(0) for each in seen]),
        residual=torch.stack(residual) if residual else torch.empty(0),
    )


def _loss(output: object, target: Tensor) -> float:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise BadInput(f"the model must return logits, got {type(output).__name__}")
    return float(F.cross_entropy(logits.flatten(0, -2), target.flatten(), ignore_index=-100))


def head_dormancy(model: nn.Module, domains: Mapping[str, tuple[Inputs, Tensor]]) -> dict[str, Tensor]:
    """Return how much the loss of each domain rises without each head: near zero, and the head is dormant there.

    Args:
        model: a model that gives logits of the next token; left as it was.
        domains: name -> inputs and targets, -100 where the loss does not look; a domain may be some positions only.

    Shapes:
        domains (B, T) -> (L, H) by name

    Example:
        >>> from torchgraft.bench.models import ByteTransformer
        >>> x = torch.arange(8)[None]
        >>> head_dormancy(ByteTransformer(16, 8, d_model=8, depth=3, num_heads=2), {"count": (x, x + 1)})["count"].shape
        torch.Size([3, 2])

    Raises:
        BadInput: the model has no attention that can be seen, or returns no logits.
    """
    found: dict[str, Tensor] = {}
    with resting(model), torch.no_grad():
        for name, (inputs, target) in domains.items():
            with attention_maps(model) as seen:
                whole = _loss(call(model, inputs), target)
            if not seen:
                raise BadInput(f"{type(model).__name__} shows no softmax or ReLU attention")
            rises = torch.zeros(len(seen), seen[0].weights.shape[1])
            for layer in range(rises.shape[0]):
                for head in range(rises.shape[1]):
                    with without_heads(model, {layer: [head]}):
                        rises[layer, head] = _loss(call(model, inputs), target) - whole
            found[name] = rises
    return found
