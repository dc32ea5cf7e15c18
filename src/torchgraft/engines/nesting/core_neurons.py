"""Feed-forward layers that run on the neurons which the beginning of each sequence activated most.

A sequence's first tokens run whole and choose the neurons; the tokens after them run with those alone, gathered rows of
the weights that are there, so that several shares of the neurons cost no second weight. Either a prompt is a call of
its own and what follows are others (:class:`SparseFeedForward`), or both stand in one pass (:class:`CoreFeedForward`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.meters.forward import resting
from torchgraft.bench.task import Inputs, call
from torchgraft.engines.causality import looks_ahead
from torchgraft.engines.feedforward import ACTIVATIONS, FeedForwardLayer
from torchgraft.engines.nesting.elastic import ElasticModule
from torchgraft.engines.sites import Refusal
from torchgraft.engines.surgery.edits import Edit
from torchgraft.engines.surgery.swap import replace_module
from torchgraft.engines.taps import record
from torchgraft.errors import BadInput, nearest

__all__ = [
    "LEAST_TOKENS",
    "CoreFeedForward",
    "CoreModel",
    "KeepCores",
    "SparseFeedForward",
    "batched_counts",
    "batched_cores",
    "core_places",
    "gather_neurons",
    "kept",
    "run_neurons",
]

#: The fewest tokens of which a beginning and a rest can be told apart.
LEAST_TOKENS = 8
#: Elements of a gathered weight that one product takes, about what a cache holds, unless one sequence needs more.
_GATHERED = 2**20

#: Weights and biases of the first linear layers on some neurons, and the weight of the last.
Neurons = tuple[list[tuple[Tensor, "Tensor | None"]], Tensor]


def kept(share: float, hidden: int) -> int:
    """Return floor(share x hidden), the number of neurons that are kept.

    Example:
        >>> kept(0.7, 10)
        7
    """
    return int(share * hidden + 1e-9)


def _tops(values: Tensor, counts: Tensor) -> Tensor:
    """Return which neurons are among the most active of each token, so many as ``counts`` says: (M, N), (M,) -> (M, N).

    Those that :meth:`torch.Tensor.topk` gives. On a CPU numpy sorts much faster than torch does either; where the least
    of the chosen has equals among the others, torch is asked.
    """
    width = values.shape[1]
    if values.device.type == "cpu":
        ordered = torch.from_numpy(np.sort(values.numpy(), axis=1))
        least = ordered.gather(1, (width - counts).clamp_max(width - 1)[:, None])
        under = ordered.gather(1, (width - counts - 1).clamp_min(0)[:, None])
        chosen = values >= least.masked_fill(counts[:, None] == 0, math.nan)
        asked = ((under >= least)[:, 0] & (counts > 0) & (counts < width)).nonzero()[:, 0]
    else:
        chosen = torch.zeros_like(values, dtype=torch.bool)
        asked = torch.arange(len(values), device=values.device)
    for count in torch.unique(counts[asked]).tolist():
        rows = asked[counts[asked] == count]
        top = values[rows].topk(count, 1, sorted=False).indices
        chosen[rows] = torch.zeros_like(chosen[rows]).scatter_(1, top, True)
    return chosen


@torch.no_grad()
def batched_counts(activations: Tensor, token_keep: float) -> Tensor:
    """Return how many tokens of each sequence have each neuron among their top floor(alpha n_pos).

    Args:
        activations: of the tokens, n_pos of a sequence being the mean number above zero.
        token_keep: alpha.

    Shapes:
        (B, T, N) -> (B, N)

    Example:
        >>> batched_counts(torch.tensor([[[3.0, 2.0, 0.0], [1.0, 5.0, 0.0]]]), 0.5).tolist()
        [[1, 1, 0]]
    """
    values = activations.detach()
    if values.dtype in (torch.bfloat16, torch.float16):
        values = values.float()
    tokens = values.shape[1]
    positive = (values > 0).flatten(1).view(torch.uint8).sum(1, dtype=torch.int32).double() / max(tokens, 1)
    wanted = (token_keep * positive + 1e-9).long().clamp_max(values.shape[2])
    chosen = _tops(values.flatten(0, 1), wanted.repeat_interleave(tokens))
    return chosen.view_as(values).view(torch.uint8).sum(1, dtype=torch.int32).long()


@torch.no_grad()
def batched_cores(activations: Tensor, *, token_keep: float, keep: float) -> Tensor:
    """Return the floor(beta N) core neurons of each sequence, in rising order; equal counts go by summed activation.

    Args:
        activations: of the tokens.
        token_keep: alpha.
        keep: beta.

    Shapes:
        (B, T, N) -> (B, K)
    """
    counts = batched_counts(activations, token_keep).double()
    weight = activations.detach().clamp_min(0).sum(1, dtype=torch.float64)
    # The sum only decides between equal counts.
    ranked = (counts + weight / (1.0 + weight.sum(1, keepdim=True))).argsort(dim=1, descending=True, stable=True)
    return ranked[:, : kept(keep, activations.shape[2])].sort(1).values


def gather_neurons(linears: tuple[nn.Linear, nn.Linear, nn.Linear | None], rows: Tensor) -> Neurons:
    """Return what some neurons of a feed-forward layer hold: of all sequences the same, or of each its own.

    Args:
        linears: (up, down, gate), as :meth:`FeedForwardLayer.linears` gives them.
        rows: which neurons.

    Shapes:
        rows (K,) -> weights (K, D) and (F, K); rows (B, K) -> (B, K, D) and (B, F, K)
    """
    up, down, gate = linears
    flat = rows.flatten()

    def first(layer: nn.Linear) -> tuple[Tensor, Tensor | None]:
        weight = layer.weight.index_select(0, flat).view(*rows.shape, layer.in_features)
        return weight, None if layer.bias is None else layer.bias.index_select(0, flat).view(rows.shape)

    firsts = [first(up)] if gate is None else [first(up), first(gate)]
    if rows.ndim == 1:
        return firsts, down.weight.index_select(1, flat)
    return firsts, down.weight.t().contiguous().index_select(0, flat).view(*rows.shape, down.out_features).mT


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    return torch.bmm(x, weight.mT) if bias is None else torch.baddbmm(bias, x, weight.mT)


def run_neurons(x: Tensor, neurons: Neurons, bias: Tensor | None, act: Callable[[Tensor], Tensor]) -> Tensor:
    """Return what a feed-forward layer says of which only :func:`gather_neurons` is there.

    Args:
        x: the tokens.
        neurons: of all sequences, or of each.
        bias: of the last linear layer.
        act: the activation.

    Shapes:
        (..., D), or (B, T, D) where each sequence has its own neurons -> (..., F)
    """
    firsts, last = neurons
    inner = [_linear(x, weight, each if each is None or weight.ndim == 2 else each[:, None]) for weight, each in firsts]
    hidden = act(inner[0]) if len(inner) == 1 else act(inner[1]) * inner[0]
    return _linear(hidden, last, bias)


class SparseFeedForward(nn.Module):
    """A feed-forward layer that runs whole while it watches, and with the rows of one set of neurons afterwards.

    Args:
        layer: what it computes.
        dense: the layer.
    """

    def __init__(self, layer: FeedForwardLayer, dense: nn.Module) -> None:
        super().__init__()
        self.dense = dense
        self.up, self.down, self.gate = layer.linears(dense)
        self.act: Callable[[Tensor], Tensor] = ACTIVATIONS[layer.activation]
        self.seen: Tensor | None = None
        self.sets: list[Tensor] | None = None
        #: How many first tokens of every call run whole.
        self.whole = 0

    def activations(self, x: Tensor) -> Tensor:
        """Return a(x): the activation, of the gate where there is one."""
        return self.act(self.up(x) if self.gate is None else self.gate(x))

    def choose(self, sets: Sequence[Tensor]) -> None:
        """Keep the rows and columns of each sequence's neurons."""
        self.sets = list(sets)
        self._cut = [gather_neurons((self.up, self.down, self.gate), rows) for rows in sets]

    def forward(self, x: Tensor) -> Tensor:
        """Run whole and keep the activations, or run the chosen neurons."""
        if self.sets is None:
            self.seen = self.activations(x.detach())
            out: Tensor = self.dense(x)
            return out
        if len(self.sets) not in (1, len(x)):
            raise BadInput(f"the prompt had {len(self.sets)} sequences, the tokens after it have {len(x)}")
        if self.whole:
            head: Tensor = self.dense(x[:, : self.whole])
            return torch.cat([head, self._all(x[:, self.whole :])], 1)
        return self._all(x)

    def _all(self, x: Tensor) -> Tensor:
        if self.sets is None:
            raise BadInput("no neurons are chosen yet")
        if len(self.sets) == 1:
            return self._sparse(x, 0)
        return torch.cat([self._sparse(x[row : row + 1], row) for row in range(len(x))])

    def _sparse(self, x: Tensor, row: int) -> Tensor:
        return run_neurons(x, self._cut[row], self.down.bias, self.act)


class CoreFeedForward(nn.Module):
    """A feed-forward layer that runs whole, or with the core neurons of each sequence's beginning after it.

    Args:
        dense: the layer.
        layer: what it computes.
        prompt: share of the tokens that run whole and choose.
        token_keep: alpha.

    Shapes:
        (B, T, D) -> (B, T, F)
    """

    def __init__(self, dense: nn.Module, layer: FeedForwardLayer, *, prompt: float, token_keep: float) -> None:
        super().__init__()
        self.dense = dense
        self.layer, self.prompt, self.token_keep = layer, prompt, token_keep
        #: Share of the neurons that run after the beginning; ``None``: the layer is what it was.
        self.keep: float | None = None
        self.training = dense.training

    def forward(self, x: Tensor) -> Tensor:
        """Run the layer; a sequence that is all beginning runs whole."""
        first = math.ceil(self.prompt * x.shape[1] - 1e-9) if x.ndim == 3 else 0
        if self.keep is None or x.ndim != 3 or len(x) == 0 or first >= x.shape[1]:
            out: Tensor = self.dense(x)
            return out
        up, down, gate = self.layer.linears(self.dense)
        act = ACTIVATIONS[self.layer.activation]
        head, tail = x[:, :first], x[:, first:]
        active = act(up(head) if gate is None else gate(head))
        whole = down(active if gate is None else active * up(head))
        rows = batched_cores(active, token_keep=self.token_keep, keep=self.keep)
        size = max(1, _GATHERED // max(1, rows.shape[1] * x.shape[2]))
        parts = []
        for start in range(0, len(x), size):
            some = rows[start : start + size]
            neurons = gather_neurons((up, down, gate), some[0] if len(some) == 1 else some)
            parts.append(run_neurons(tail[start : start + size], neurons, down.bias, act))
        return torch.cat([whole, parts[0] if len(parts) == 1 else torch.cat(parts)], 1)


class CoreModel(ElasticModule):
    """A model whose feed-forward layers run on core neurons below the full budget.

    Args:
        model: the model, its layers replaced by :class:`CoreFeedForward`.
        wanted: shares of the neurons, rising, in (0, 1); one budget each, and the full one.
    """

    def __init__(self, model: nn.Module, wanted: Sequence[float]) -> None:
        super().__init__((*wanted, 1.0))
        self.model = model
        self.wanted = tuple(wanted)

    @property
    def layers(self) -> dict[str, CoreFeedForward]:
        """The layers, by their names in the original."""
        return {name: each for name, each in self.model.named_modules() if isinstance(each, CoreFeedForward)}

    def select(self, level: int) -> None:
        """Keep as many neurons as the level says, all at the last."""
        share = None if level == len(self.wanted) else self.wanted[level]
        for layer in self.layers.values():
            layer.keep = share

    def forward(self, *args: object, **kwargs: object) -> object:
        """Call the model at the budget that is set."""
        return self.model(*args, **kwargs)


class KeepCores(Edit):
    """Let feed-forward layers run on core neurons.

    Args:
        names: dotted names of the layers.
        ups, downs, gates: dotted names of the linear layers in each; a gate is ``None`` where there is none.
        activations: of each.
        wanted: as for :class:`CoreModel`.
        prompt, token_keep: as for :class:`CoreFeedForward`.
    """

    op: ClassVar[str] = "keep-cores"
    names: tuple[str, ...] = Field(min_length=1)
    ups: tuple[str, ...]
    downs: tuple[str, ...]
    gates: tuple[str | None, ...]
    activations: tuple[str, ...]
    wanted: tuple[float, ...] = Field(min_length=1)
    prompt: float = Field(gt=0, lt=1)
    token_keep: float = Field(gt=0, le=1)

    def rewrite(self, model: nn.Module) -> nn.Module:
        """Wrap each layer."""
        known = dict(model.named_modules())
        parts = (self.names, self.ups, self.downs, self.gates, self.activations)
        for name, up, down, gate, activation in zip(*parts, strict=True):
            for inner in (up, down, gate):
                if inner is not None and type(known.get(f"{name}.{inner}")) is not nn.Linear:
                    raise BadInput(f"the model has no linear layer {f'{name}.{inner}'!r}{nearest(name, list(known))}")
            if activation not in ACTIVATIONS:
                raise BadInput(f"activation of {name!r} must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
            first: nn.Linear = known[f"{name}.{up}"]
            layer = FeedForwardLayer(name, up, down, gate, activation, first.in_features, first.out_features)
            cores = CoreFeedForward(known[name], layer, prompt=self.prompt, token_keep=self.token_keep)
            replace_module(model, name, cores)
        made = CoreModel(model, self.wanted)
        made.training = model.training
        return made

    def describe(self) -> dict[str, str]:
        """Return what each layer does."""
        words = f"runs the first {self.prompt:.0%} of the tokens whole, and the others with the neurons that they chose"
        return dict.fromkeys(self.names, words)


@torch.no_grad()
def core_places(
    model: nn.Module, example: Inputs, layers: Sequence[FeedForwardLayer], wanted: Sequence[float]
) -> tuple[list[FeedForwardLayer], list[Refusal]]:
    """Return those of ``layers`` that can run on the core neurons of a beginning, and why the others cannot.

    Args:
        model: the model; left as it was.
        example: inputs for it, two samples or more.
        layers: its feed-forward layers.
        wanted: shares of the neurons that are to be told apart.
    """
    refused: dict[str, str] = {}
    shapes: dict[str, torch.Size] = {}
    if layers:
        with resting(model), record(model, [layer.name for layer in layers], "input") as seen:
            call(model, example)
        shapes = {layer.name: seen[layer.name].shape for layer in layers}
    by_length: dict[int, list[str]] = {}
    for layer in layers:
        shape, counts = shapes[layer.name], [kept(share, layer.hidden) for share in (0.0, *wanted, 1.0)]
        if len(shape) != 3 or shape[1] < LEAST_TOKENS:
            refused[layer.name] = (
                f"it needs sequences (B, T, D) of at least {LEAST_TOKENS} tokens, a beginning and a rest, and takes "
                f"{tuple(shape)}"
            )
        elif any(low >= high for low, high in itertools.pairwise(counts)):
            refused[layer.name] = f"its {layer.hidden} neurons are too few for the shares {tuple(wanted)}"
        else:
            by_length.setdefault(shape[1], []).append(layer.name)
    for tokens, names in by_length.items():
        try:
            ahead = looks_ahead(model, example, names, tokens=tokens)
        except BadInput as error:
            refused |= dict.fromkeys(names, str(error))
            continue
        late = names if "" in ahead else ahead
        why = (
            "the model is not causal: it looks ahead, so that a sequence has no beginning that is there before the rest"
        )
        refused |= dict.fromkeys(late, why)
    return (
        [layer for layer in layers if layer.name not in refused],
        [Refusal(layer.name, refused[layer.name]) for layer in layers if layer.name in refused],
    )
