"""Decode with the few feed-forward neurons that the prompt activated most, chosen once and for all tokens to come.

`CoreInfer: Accelerating Large Language Model Inference with Semantics-Inspired Adaptive Sparse Activation
<https://arxiv.org/abs/2410.18311>`_ (Wang et al., 2024).

Equation: ``C = the floor(beta N) neurons most often among a token's top floor(alpha n_pos)``, then
``y = W_down[:, C] (act(W_gate[C] h) * (W_up[C] h)) + b``.

Departures: several sequences of a batch have a set each, where the paper's code takes one sequence. Neurons with equal
counts are ranked by their summed activation.

It is no lever of ``fit``: the neurons that a prompt chooses save work on the tokens that are decoded after it, and the
pass over a whole sample, which ``fit`` scores and times, is the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.meters.forward import resting
from torchgraft.bench.task import Inputs, call
from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.engines.feedforward import ACTIVATIONS, FeedForwardLayer, feedforwards
from torchgraft.engines.surgery.swap import replace_module
from torchgraft.errors import BadInput

__all__ = ["CARD", "Clusters", "Cores", "cluster_cores", "core_counts", "core_overlap", "core_sets", "coreinfer"]

CARD = Card(
    key="coreinfer",
    title="CoreInfer",
    seed_id=52,
    authors="Wang, Vahidian, Ye, Gu, Zhang and Chen, 2024",
    reference="https://arxiv.org/abs/2410.18311",
    family="elastic",
    kind="tool",
    engine=("taps", "surgery"),
    equation="C = top floor(beta N) by |{m : j in top floor(alpha n_pos) of a(x_m)}|; "
    "y = W_down[:, C] (act(W_gate[C] h) * (W_up[C] h)) + b",
    entry="coreinfer",
    oracles=(
        "with all neurons kept the outputs are the dense model's, and for any set those of the dense layer with the "
        "activations outside the set at zero, to 1e-12 in float64",
        "where the tokens to come activate only neurons of the set, sparse and dense decoding are equal",
        "counts sum to the number of a token's core neurons over all tokens, and floor(beta N) neurons are kept",
        "the dense model is back when the block ends, also by an exception",
    ),
    claim=Claim(
        text="A 2-layer ReLU byte transformer (width 64, 256 neurons) trained on Python sources continues 64-byte "
        "prompts from held-out files with 40 percent of its neurons. Beside it: as many random neurons, and the top "
        "neurons of each token by itself. Next-byte loss on the continuation.",
        figure="core neurons lose < 15 % of the gap (random - dense), and the overlap between cores of two halves of "
        "one text exceeds that across kinds of text (prose and tables) by >= 0.1 (mean of 3 seeds)",
    ),
    choose_when="a language model with ReLU-like, sparse activations decodes long answers to one prompt at a time",
    choose_instead="activation-free pruning for models with dense activations; adaptive-computation-module where "
    "training is affordable and tokens differ",
    bibtex="@article{wang2024coreinfer, title={CoreInfer: Accelerating Large Language Model Inference with "
    "Semantics-Inspired Adaptive Sparse Activation}, author={Wang, Qinsi and Vahidian, Saeed and Ye, Hancheng and Gu, "
    "Jianyang and Zhang, Jianyi and Chen, Yiran}, journal={arXiv preprint arXiv:2410.18311}, year={2024}}",
)


def core_counts(activations: Tensor, token_keep: float = 0.4) -> Tensor:
    """Return how many tokens have each neuron among their top floor(alpha n_pos), n_pos the mean number above zero.

    Args:
        activations: of the tokens of one text.
        token_keep: alpha.

    Shapes:
        (T, N) -> (N,)

    Example:
        >>> core_counts(torch.tensor([[3.0, 2.0, 0.0], [1.0, 5.0, 0.0]]), 0.5).tolist()
        [1, 1, 0]
    """
    positive = float((activations > 0).sum(1).double().mean())
    count = min(int(token_keep * positive + 1e-9), activations.shape[1])
    counts = torch.zeros(activations.shape[1], dtype=torch.long, device=activations.device)
    top = activations.topk(count, dim=1).indices.flatten()
    return counts.index_add(0, top, torch.ones_like(top))


def core_sets(activations: Tensor, *, token_keep: float = 0.4, keep: float = 0.4) -> Tensor:
    """Return the floor(beta N) core neurons of one text, in rising order; (T, N) -> (K,)."""
    counts = core_counts(activations, token_keep).double()
    weight = activations.double().clamp_min(0).sum(0)
    # The sum only decides between equal counts.
    ranked = (counts + weight / (1.0 + weight.sum())).argsort(descending=True, stable=True)
    return ranked[: int(keep * activations.shape[1] + 1e-9)].sort().values


class _SparseFeedForward(nn.Module):
    """A feed-forward layer that runs whole while it watches, and with the rows of one set of neurons afterwards."""

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
        self.sets, self._cut = list(sets), []
        for rows in sets:
            firsts = [self.up] if self.gate is None else [self.up, self.gate]
            cut = [(layer.weight[rows], None if layer.bias is None else layer.bias[rows]) for layer in firsts]
            self._cut.append((cut, self.down.weight[:, rows]))

    def forward(self, x: Tensor) -> Tensor:
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
        firsts, down = self._cut[row]
        inner = [F.linear(x, weight, bias) for weight, bias in firsts]
        hidden = self.act(inner[0]) if len(inner) == 1 else self.act(inner[1]) * inner[0]
        return F.linear(hidden, down, self.down.bias)


@dataclass(frozen=True)
class Clusters:
    """Core neurons of kinds of text, for prompts that are too short to show their own.

    Args:
        probe: the layer by whose core set a prompt's cluster is told.
        centres: share of a cluster's texts in whose core each neuron of the probe is, (k, N).
        sets: by layer, the core neurons of each cluster.
        token_keep, keep: with which they were found.
    """

    probe: str
    centres: Tensor
    sets: dict[str, tuple[Tensor, ...]]
    token_keep: float
    keep: float

    def predict(self, core: Tensor) -> int:
        """Return the cluster whose centre is nearest to a core set of the probe layer."""
        hot = torch.zeros(self.centres.shape[1], dtype=torch.float64)
        hot[core] = 1.0
        return int((self.centres - hot).square().sum(1).argmin())


class Cores:
    """What :func:`coreinfer` yields: the chosen neurons, once the prompt was read.

    Args:
        layers: the sparse layers, by name.
    """

    def __init__(self, layers: dict[str, _SparseFeedForward]) -> None:
        self._layers = layers

    @property
    def sets(self) -> dict[str, list[Tensor]]:
        """The core neurons of each sequence, by layer; empty before the prompt."""
        return {name: list(layer.sets) for name, layer in self._layers.items() if layer.sets is not None}

    def use(self, sets: dict[str, Sequence[Tensor]]) -> None:
        """Take these neurons in place of those of a prompt."""
        for name, chosen in sets.items():
            self._layers[name].choose(chosen)


@contextmanager
def _swapped(model: nn.Module, example: Inputs, layers: slice | None) -> Iterator[dict[str, _SparseFeedForward]]:
    found = feedforwards(model, example)[layers or slice(None)]
    if not found:
        raise BadInput(f"{type(model).__name__} has no feed-forward layer among those asked for")
    held = {layer.name: _SparseFeedForward(layer, model.get_submodule(layer.name)) for layer in found}
    try:
        for name, sparse in held.items():
            replace_module(model, name, sparse)
        yield held
    finally:
        for name, sparse in held.items():
            replace_module(model, name, sparse.dense)


@contextmanager
def coreinfer(
    model: nn.Module,
    prompt: Inputs,
    *,
    token_keep: float = 0.4,
    keep: float = 0.4,
    layers: slice | None = None,
    mode: Literal["stability", "similarity"] = "stability",
    clusters: Clusters | None = None,
    reread: bool = False,
) -> Iterator[Cores]:
    """Read ``prompt`` whole, then let the model run with its core neurons while the block runs.

    Args:
        model: a model with feed-forward layers; whole again when the block ends.
        prompt: inputs of the model, sequences (B, T) or more.
        token_keep: alpha, the share of its positive neurons that a token counts for.
        keep: beta, the share of neurons that is kept.
        layers: which feed-forward layers; the paper leaves the first and the last dense, ``slice(1, -1)``.
        mode: ``"stability"`` takes the prompt's own neurons, ``"similarity"`` those of the cluster that it belongs to.
        clusters: for ``"similarity"``, from :func:`cluster_cores`.
        reread: whether later calls begin with the prompt again, in a model without a cache; its tokens then run whole,
            as they do where a cache keeps what the whole model made of them.

    Example:
        >>> from torchgraft.bench.models import ByteTransformer
        >>> model = ByteTransformer(16, 8, d_model=8, depth=2, num_heads=2).eval()
        >>> with torch.no_grad(), coreinfer(model, torch.arange(6)[None], keep=0.25) as cores:
        ...     logits = model(torch.arange(7)[None])
        >>> {name: len(sets[0]) for name, sets in cores.sets.items()}
        {'blocks.0.mlp': 8, 'blocks.1.mlp': 8}

    Raises:
        BadInput: a share lies outside (0, 1], clusters are missing, or the model has no feed-forward layer.
    """
    if not 0.0 < token_keep <= 1.0 or not 0.0 < keep <= 1.0:
        raise BadInput(f"token_keep and keep must lie in (0, 1], got {token_keep} and {keep}")
    if mode not in ("stability", "similarity") or (mode == "similarity") != (clusters is not None):
        raise BadInput(f"mode 'similarity' needs clusters and 'stability' none, got mode {mode!r} and {clusters!r:.40}")
    with _swapped(model, prompt, layers) as held:
        _read(model, prompt)
        if clusters is None:
            for layer in held.values():
                layer.choose([core_sets(one, token_keep=token_keep, keep=keep) for one in _texts(layer)])
        else:
            if clusters.probe not in held or not clusters.sets.keys() >= held.keys():
                raise BadInput(f"the clusters are of layers {list(clusters.sets)}, asked for are {list(held)}")
            probe = held[clusters.probe]
            kinds = [
                clusters.predict(core_sets(one, token_keep=clusters.token_keep, keep=clusters.keep))
                for one in _texts(probe)
            ]
            for name, layer in held.items():
                layer.choose([clusters.sets[name][kind] for kind in kinds])
        for layer in held.values():
            layer.whole = len(_texts(layer)[0]) if reread else 0
        yield Cores(held)


def _read(model: nn.Module, prompt: Inputs) -> None:
    with resting(model), torch.no_grad():
        call(model, prompt)


def _texts(layer: _SparseFeedForward) -> list[Tensor]:
    """Return the activations of each sequence, (T, N)."""
    if layer.seen is None:
        raise BadInput("the model did not run this layer on the prompt")
    return list(layer.seen.flatten(1, -2)) if layer.seen.ndim > 2 else [layer.seen]


def _cores_of(
    model: nn.Module, texts: Sequence[Inputs], token_keep: float, keep: float, layers: slice | None
) -> list[dict[str, Tensor]]:
    """Return the core neurons of each of ``texts``, each a batch of one."""
    made: list[dict[str, Tensor]] = []
    with _swapped(model, texts[0], layers) as held:
        for text in texts:
            _read(model, text)
            made.append(
                {name: core_sets(_texts(layer)[0], token_keep=token_keep, keep=keep) for name, layer in held.items()}
            )
    return made


def core_overlap(
    model: nn.Module,
    texts: Sequence[Inputs],
    *,
    token_keep: float = 0.4,
    keep: float = 0.4,
    layers: slice | None = None,
) -> Tensor:
    """Return |C_i & C_j| / |C| of each two texts, the mean over layers; (n, n).

    Args:
        model: a model with feed-forward layers.
        texts: inputs of the model, one sequence each.
        token_keep, keep, layers: as for :func:`coreinfer`.
    """
    if not texts:
        raise BadInput("core_overlap needs at least one text")
    cores = _cores_of(model, texts, token_keep, keep, layers)
    overlap = torch.zeros(len(texts), len(texts), dtype=torch.float64)
    for name in cores[0]:
        for i, first in enumerate(cores):
            for j, second in enumerate(cores):
                overlap[i, j] += float(torch.isin(first[name], second[name]).double().mean()) / len(cores[0])
    return overlap


def cluster_cores(
    model: nn.Module,
    texts: Sequence[Inputs],
    *,
    k: int | None = None,
    probe: int = 0,
    token_keep: float = 0.4,
    keep: float = 0.4,
    layers: slice | None = None,
    seed: int = 0,
) -> Clusters:
    """Group texts by their core neurons at one layer, and find the neurons of each group at every layer.

    Args:
        model: a model with feed-forward layers.
        texts: inputs of the model, one sequence each.
        k: number of clusters; default: between 4 and 8, where the error stops falling fastest (the elbow).
        probe: the layer, counted among those of ``layers``.
        token_keep, keep, layers: as for :func:`coreinfer`.
        seed: of k-means.

    Raises:
        BadInput: there are fewer texts than clusters, or ``k`` is below 1.
    """
    from sklearn.cluster import KMeans

    if len(texts) < (4 if k is None else k) or (k is not None and k < 1):
        raise BadInput(f"k must be at least 1 and at most the number of texts, got k {k} and {len(texts)} texts")
    cores = _cores_of(model, texts, token_keep, keep, layers)
    names = list(cores[0])
    sizes = {layer.name: layer.hidden for layer in feedforwards(model, texts[0])}
    hot = {name: torch.zeros(len(texts), sizes[name], dtype=torch.float64) for name in names}
    for row, core in enumerate(cores):
        for name in names:
            hot[name][row, core[name]] = 1.0
    points = hot[names[probe]].numpy()
    distinct = len(torch.unique(hot[names[probe]], dim=0))  # k-means can make no more clusters than points
    choices = range(min(4, distinct), min(8, distinct) + 1) if k is None else (min(k, distinct),)
    fits = [KMeans(n_clusters=choice, n_init=4, random_state=seed).fit(points) for choice in choices]
    errors = [float(fit.inertia_) for fit in fits]
    bends = [errors[i - 1] - 2 * errors[i] + errors[i + 1] for i in range(1, len(errors) - 1)]
    best = fits[1 + max(range(len(bends)), key=bends.__getitem__)] if bends else fits[0]
    labels = torch.from_numpy(best.labels_).long()
    sets = {
        name: tuple(
            hot[name][labels == kind].sum(0).argsort(descending=True, stable=True)[: len(cores[0][name])].sort().values
            for kind in range(best.n_clusters)
        )
        for name in names
    }
    return Clusters(names[probe], torch.from_numpy(best.cluster_centers_).double(), sets, token_keep, keep)
