"""How much of a recurrent network can go: pruning by magnitude, and networks whose structure is a random graph.

`Investigating Sparsity in Recurrent Neural Networks <https://arxiv.org/abs/2407.20601>`_ (Darji, 2024).

Equation: ``igate = x (W_ih * M_ih)^T + b_ih,  hgate = h (W_hh * M_hh)^T + b_hh,  M = 1[|W| >= percentile_p |W|]``.

As a lever of ``fit``, :class:`RecurrentPruning` prunes the matrices of a trained model's recurrent layers at once; the
recovery that follows trains what is left. The matrices are stored as their kept values and a pattern, and are executed
dense: the file is smaller, and nothing gets faster.

Departures:
- Of equal magnitudes as many go as the percentage asks for, so that the count is exact.
- :class:`RecurrentPruning` takes the percentile of each matrix alone, unless told to pool them as the thesis does, for
  otherwise a small matrix of small weights may lose nearly all; a matrix whose file would not shrink stays as it is.
- Executed sparse, a loop over torchgraft's kernel took 0.5 of the time of torch's fused LSTM at 512 units, 90 % sparse,
  32 strings, but 0.8 at 256 units, 1.1 at 128 and 1.4 at 64, and 2 to 6 there one string at a time: it stays dense.
- The weights between layers of a structured network are one matrix from all earlier layers, with the mask of the
  graph's edges. Strings are classified at their last true symbol, where the thesis reads the last padded step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import networkx as nx
import numpy as np
import torch
from torch import Tensor, nn

from torchgraft.bench.task import Task
from torchgraft.catalogue import Card, Claim
from torchgraft.engines.masks import keep_best, keep_global, magnitude
from torchgraft.engines.procedure import Procedure, Refusal, Site, check_strength
from torchgraft.engines.sparse.stored import HoldSparse, matrix_obstacles, pattern_bytes, recurrent_matrices
from torchgraft.engines.surgery.edits import Edit
from torchgraft.errors import BadInput, nearest

__all__ = [
    "CARD",
    "ArbitraryStructureRNN",
    "Importance",
    "RecurrentPruning",
    "graph_properties",
    "layered",
    "property_importance",
    "prune_rnn",
    "regain_curve",
]

CARD = Card(
    key="sparse-rnn-study",
    title="Sparsity in recurrent networks",
    seed_id=138,
    authors="Darji, 2024",
    reference="https://arxiv.org/abs/2407.20601",
    family="shrink/prune",
    kind="procedure",
    engine=("masks", "surgery", "recurrence"),
    equation="M = 1[|W| >= percentile_p |W|] of the input and state matrices, held while the network is retrained",
    entry="RecurrentPruning",
    stage="weights",
    example={"model": "recurrent"},
    oracles=(
        "the lever's matrices keep as many weights as asked for, outputs equal those of masked dense layers, and what"
        " is gone stays exactly zero through training with momentum and weight decay",
        "a saved model comes back with the same bits, and its file holds the kept values and a pattern",
        "as many weights go as the percentage asks for, one global threshold parts them, and they stay exactly zero "
        "while the network is retrained with momentum and weight decay",
        "with all edges between neighbouring layers and none beyond, a structured network is torch's stacked RNN",
        "the layering puts every edge from a lower to a higher layer, and a node one above its highest predecessor",
        "graph properties of a path, a star and a complete graph are those worked out by hand",
        "every generated string is accepted or rejected by the grammar as its label says",
    ),
    claim=Claim(
        text="Reber strings, accepted or not; tanh RNN, GRU and LSTM of 48 units, 60, 70 and 80 % of all "
        "recurrent and input weights pruned, then retrained; and networks of random graphs, whose accuracy a random "
        "forest predicts from properties of the graph",
        figure="GRU and LSTM keep >= 98 % of their accuracy at 60 to 80 % and regain it within 2 epochs, the tanh RNN "
        "keeps less than either at 80 % before retraining; R2 of the forest on held-out graphs > 0.5; mean of 3 seeds",
    ),
    choose_when="the file of a model with RNN, GRU or LSTM layers must be small (they run dense, no faster); or the"
    " question is how many weights a recurrent network needs, or which structure",
    choose_instead="lottery-ticket or fast-sparse-conv for linear layers and convolutions; a smaller hidden size where"
    " latency counts",
    bibtex="@mastersthesis{darji2024investigating, title={Investigating Sparsity in Recurrent Neural Networks}, "
    "author={Darji, Harshil Jagadishbhai}, school={University of Passau}, year={2024}, note={arXiv:2407.20601}}",
)

Mode = Literal["RNN_TANH", "RNN_RELU", "GRU", "LSTM"]
#: Bytes that the pattern's own entry takes in a file.
_ENTRY = 128
_GATES = {"RNN_TANH": 1, "RNN_RELU": 1, "GRU": 3, "LSTM": 4}


# Pruning.


def prune_rnn(model: nn.Module, percent: float, *, i2h: bool = True, h2h: bool = True) -> dict[str, Tensor]:
    """Set the smallest weights of all recurrent layers to zero in place, keep them there, and return the masks.

    Gradients of the pruned weights are zero from then on, so that an optimiser made afterwards leaves them alone.

    Args:
        model: holds ``nn.RNN``, ``nn.GRU`` or ``nn.LSTM`` layers.
        percent: of the weights of the chosen kinds, over all layers together.
        i2h: whether weights from the input (or the layer below) to the hidden state count.
        h2h: whether weights from hidden state to hidden state count.

    Returns:
        Parameter name -> True where the weight is kept.

    Raises:
        BadInput: ``percent`` lies outside [0, 100], no kind is chosen, or there is no recurrent layer.

    Example:
        >>> masks = prune_rnn(nn.GRU(4, 8), 75.0)
        >>> {name: mask.shape for name, mask in masks.items()}, sum(int(mask.sum()) for mask in masks.values())
        ({'weight_ih_l0': torch.Size([24, 4]), 'weight_hh_l0': torch.Size([24, 8])}, 72)
    """
    if not 0 <= percent <= 100:
        raise BadInput(f"percent must lie in [0, 100], got {percent}")
    kinds = [kind for kind, chosen in (("weight_ih", i2h), ("weight_hh", h2h)) if chosen]
    if not kinds:
        raise BadInput("prune_rnn needs i2h or h2h, or both")
    weights = {
        f"{name}.{leaf}" if name else leaf: value
        for name, module in model.named_modules()
        if isinstance(module, nn.RNNBase)
        for leaf, value in module.named_parameters(recurse=False)
        if leaf.startswith(tuple(kinds))
    }
    if not weights:
        raise BadInput(f"{type(model).__name__} has no nn.RNN, nn.GRU or nn.LSTM")
    scores = magnitude(weights)
    masks = keep_best(scores, keep_global(scores, percent / 100))
    for name, mask in masks.items():
        value = weights[name]
        with torch.no_grad():
            value.mul_(mask)
        value.register_hook(lambda grad, mask=mask: grad * mask)  # type: ignore[no-untyped-call]  # torch's
    return masks


class RecurrentPruning(Procedure):
    """Prune input and state matrices of recurrent layers by magnitude; strength is how few weights stay.

    At strength s a share (1 - most) ** s of each ``weight_ih`` and ``weight_hh`` of ``nn.RNN``, ``nn.GRU`` and
    ``nn.LSTM`` is kept, in all layers and both directions; biases and projections stay. The model is to be retrained
    afterwards, as recovery does. What is left is stored sparse and executed dense: the file is smaller, and a pass
    takes as long as before. A matrix whose file would not shrink stays as it is.

    Args:
        most: the sparsity at strength 1.
        i2h: whether weights from the input (or the layer below) to the hidden state are pruned.
        h2h: whether weights from hidden state to hidden state are pruned.
        pooled: whether one threshold parts the weights of all matrices, rather than one each.

    Example:
        >>> x, y = torch.randn(32, 5, 8), torch.randint(0, 3, (32,))
        >>> model = nn.ModuleDict({"rnn": nn.LSTM(8, 16)})
        >>> loss = nn.functional.cross_entropy
        >>> task = Task(model, (x, y), (x, y), (x, y), loss, lambda out, target: (out.argmax(1) == target).float())
        >>> RecurrentPruning().apply(model, task, 0.5)["rnn"]
        SparseLSTM(8, 16, sparsity=0.859)

    Raises:
        BadInput: ``most`` lies outside (0, 1), or no kind is chosen.
    """

    card = CARD
    expense = 0

    def __init__(self, *, most: float = 0.98, i2h: bool = True, h2h: bool = True, pooled: bool = False) -> None:
        if not 0.0 < most < 1.0:
            raise BadInput(f"most must lie in (0, 1), got {most}")
        if not (i2h or h2h):
            raise BadInput("RecurrentPruning needs i2h or h2h, or both")
        self.most, self.pooled = most, pooled
        self.kinds = tuple(kind for kind, chosen in (("weight_ih", i2h), ("weight_hh", h2h)) if chosen)

    def _chosen(self, name: str) -> bool:
        return name.rpartition(".")[2].startswith(self.kinds)

    def applies_to(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Site]:
        """Return the matrices of recurrent layers, by parameter name."""
        found = recurrent_matrices(model, ignore=ignore)
        return [
            Site(name, "weight", value.numel(), value.numel()) for name, value in found.items() if self._chosen(name)
        ]

    def refusals(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Refusal]:
        """Return the recurrent matrices that stay dense, and why."""
        found = matrix_obstacles(model, ignore=ignore)
        return [Refusal(name, f"left dense: {reason}") for name, reason in found.items() if self._chosen(name)]

    def plan(
        self, model: nn.Module, task: Task, strength: float, *, ignore: Sequence[str] = (), seed: int = 0
    ) -> list[Edit]:
        """Keep the largest weights of each matrix for which that makes the file smaller."""
        matrices = {k: v for k, v in recurrent_matrices(model, ignore=ignore).items() if self._chosen(k)}
        sparsity = 1.0 - (1.0 - self.most) ** check_strength(strength)
        if self.pooled:
            counts = keep_global(magnitude(matrices), sparsity)
        else:
            counts = {name: round((1.0 - sparsity) * value.numel()) for name, value in matrices.items()}
        kept = {name: max(1, count) for name, count in counts.items() if _pays(matrices[name], max(1, count))}
        return [HoldSparse(parameters=kept)] if kept else []


def _pays(weight: Tensor, kept: int) -> bool:
    """Say whether ``kept`` values and their pattern take fewer bytes than the matrix."""
    total, each = weight.numel(), weight.element_size()
    return kept * each + pattern_bytes(kept, total) + _ENTRY < total * each


def regain_curve(
    train_epoch: Callable[[], None], score: Callable[[], float], target: float, *, epochs: int = 10
) -> tuple[list[float], int | None]:
    """Return the score before and after each epoch of retraining, and the first epoch at which ``target`` is reached.

    Args:
        train_epoch: trains for one epoch.
        score: scores the model as it stands.
        target: the score that counts as regained.
        epochs: at most this many; retraining ends where the target is reached.

    Example:
        >>> level = iter([0.5, 0.8, 0.97, 0.99])
        >>> regain_curve(lambda: None, lambda: next(level), 0.97)
        ([0.5, 0.8, 0.97], 2)
    """
    found = [score()]
    for epoch in range(1, epochs + 1):
        if found[-1] >= target:
            return found, epoch - 1
        train_epoch()
        found.append(score())
    return found, epochs if found[-1] >= target else None


# Structure from a graph.


def layered(graph: nx.Graph) -> list[list[int]]:
    """Return the nodes of ``graph`` by layer: edges run from the lower number to the higher, a source is in layer 0.

    The layer of a node is the longest path to it from a source.

    Example:
        >>> layered(nx.Graph([(0, 2), (1, 2), (2, 3), (0, 3)]))
        [[0, 1], [2], [3]]
    """
    depth: dict[int, int] = {}
    for node in sorted(graph.nodes):
        depth[node] = max((depth[other] + 1 for other in graph.neighbors(node) if other < node), default=0)
    layers: list[list[int]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
    for node, layer in depth.items():
        layers[layer].append(node)
    return layers


class ArbitraryStructureRNN(nn.Module):
    """A recurrent network with one unit a node of a graph, connected as the graph is.

    A unit reads, besides its own layer's state, the units of earlier layers that it has an edge to. The units of the
    first layer read the whole input; the output is the state of the last layer.

    Args:
        graph: undirected, nodes numbered; edges run from the lower number to the higher.
        input_size: D.
        mode: ``"RNN_TANH"``, ``"RNN_RELU"``, ``"GRU"`` or ``"LSTM"``.

    Shapes:
        (B, T, D) -> (B, T, units of the last layer)

    Example:
        >>> ArbitraryStructureRNN(nx.path_graph(4), 3)(torch.zeros(2, 5, 3)).shape
        torch.Size([2, 5, 1])

    Raises:
        BadInput: the graph is empty, or the mode is unknown.
    """

    def __init__(self, graph: nx.Graph, input_size: int, *, mode: Mode = "GRU") -> None:
        super().__init__()
        if mode not in get_args(Mode):
            raise BadInput(f"mode must be one of {', '.join(_GATES)}, got {mode!r}{nearest(str(mode), list(_GATES))}")
        if input_size < 1 or graph.number_of_nodes() < 1:
            raise BadInput(f"a network needs an input and a node, got {input_size} and {graph.number_of_nodes()}")
        self.mode, self.nodes = mode, layered(graph)
        self.layers = nn.ModuleList()
        earlier: list[int] = []
        for nodes in self.nodes:
            width = len(earlier) or input_size
            layer = getattr(nn, "RNN" if mode.startswith("RNN") else mode)(width, len(nodes), batch_first=True)
            mask = torch.ones(len(nodes), width)
            if earlier:
                mask = torch.tensor([[float(graph.has_edge(node, other)) for other in earlier] for node in nodes])
            layer.register_buffer("mask", mask.repeat(_GATES[mode], 1), persistent=False)
            self.layers.append(layer)
            earlier = [*earlier, *nodes]

    def forward(self, x: Tensor) -> Tensor:
        """Return the states of the last layer over time."""
        first = self.layers[0]
        if x.ndim != 3 or x.shape[-1] != first.get_buffer("mask").shape[1]:
            raise BadInput(f"x must be (B, T, {first.get_buffer('mask').shape[1]}), got {tuple(x.shape)}")
        run: Any = {"RNN_TANH": torch.rnn_tanh, "RNN_RELU": torch.rnn_relu, "GRU": torch.gru, "LSTM": torch.lstm}[
            self.mode
        ]
        read, made = x, list[Tensor]()
        for layer, nodes in zip(self.layers, self.nodes, strict=True):
            start = x.new_zeros(1, len(x), len(nodes))
            w_ih, w_hh, b_ih, b_hh = (
                layer.get_parameter(f"{name}_l0") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            weights = [w_ih * layer.get_buffer("mask"), w_hh, b_ih, b_hh]
            state = (start, start) if self.mode == "LSTM" else start
            made.append(run(read, state, weights, True, 1, 0.0, self.training, False, True)[0])
            read = torch.cat(made, dim=-1)
        return made[-1]


def graph_properties(graph: nx.Graph) -> dict[str, float]:
    """Return what may be said of a graph in numbers: size, distances, and means and variances of centralities.

    Distances and eccentricities are those of the largest connected part.

    Example:
        >>> found = graph_properties(nx.star_graph(3))
        >>> found["nodes"], found["edges"], found["diameter"], found["average shortest path"]
        (4.0, 3.0, 2.0, 1.5)
    """
    part = graph.subgraph(max(nx.connected_components(graph), key=len))
    found = {
        "nodes": float(graph.number_of_nodes()),
        "edges": float(graph.number_of_edges()),
        "diameter": float(nx.diameter(part)),
        "density": float(nx.density(graph)),
        "average shortest path": float(nx.average_shortest_path_length(part)) if len(part) > 1 else 0.0,
    }
    for name, values in (
        ("closeness", nx.closeness_centrality(graph)),
        ("degree", nx.degree_centrality(graph)),
        ("betweenness", nx.betweenness_centrality(graph)),
        ("eccentricity", nx.eccentricity(part)),
    ):
        numbers = np.array(list(values.values()), dtype=float)
        found[f"{name}, mean"], found[f"{name}, variance"] = float(numbers.mean()), float(numbers.var())
    return found


@dataclass(frozen=True)
class Importance:
    """What a random forest says of the properties of graphs.

    Args:
        r2: on graphs that it was not trained on, by cross-validation; 0 where all accuracies are one.
        importance: property -> share of the forest's reduction of variance, the largest first.
        correlation: property -> correlation with the accuracy.
    """

    r2: float
    importance: dict[str, float]
    correlation: dict[str, float]


def property_importance(
    results: Sequence[tuple[Mapping[str, float], float]], *, folds: int = 5, seed: int = 0
) -> Importance:
    """Regress accuracies on properties of graphs by a random forest, and rank the properties.

    Args:
        results: (properties, accuracy) of each graph, all with the same properties.
        folds: of the cross-validation.
        seed: of the forest and the folds.

    Raises:
        BadInput: there are fewer graphs than folds, or properties differ.

    Example:
        >>> rows = [({"size": float(n), "noise": float(n % 2)}, n / 40) for n in range(40)]
        >>> found = property_importance(rows)
        >>> found.r2 > 0.9, next(iter(found.importance))
        (True, 'size')
    """
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.metrics import r2_score
    from sklearn.model_selection import KFold, cross_val_predict

    names = list(results[0][0]) if results else []
    if len(results) < max(folds, 2) or folds < 2 or any(list(properties) != names for properties, _ in results):
        raise BadInput(f"property_importance needs at least {folds} results with the same properties")
    x = np.array([[properties[name] for name in names] for properties, _ in results])
    y = np.array([accuracy for _, accuracy in results])
    forest = RandomForestRegressor(n_estimators=200, random_state=seed)
    guessed = cross_val_predict(forest, x, y, cv=KFold(folds, shuffle=True, random_state=seed))
    shares = forest.fit(x, y).feature_importances_
    moving = {name: bool(x[:, place].std() > 0 and y.std() > 0) for place, name in enumerate(names)}
    return Importance(
        r2=float(r2_score(y, guessed)) if y.std() > 0 else 0.0,
        importance={names[place]: float(shares[place]) for place in np.argsort(-shares, kind="stable")},
        correlation={
            name: float(np.corrcoef(x[:, place], y)[0, 1]) if moving[name] else 0.0 for place, name in enumerate(names)
        },
    )
