"""Sparsity in recurrent networks on Reber strings: accepted, in the wrong branch, or in other letters.

Strings are plain and of at most 18 symbols, no two alike, so that the 400 of the test are unseen. Networks of 48 units
(embedding of 16, batches of 32, Adam 3e-3, gradients clipped at 5) are trained on 1,600 for 15 epochs; 60, 70 and 80 %
of all recurrent and input weights go, and each is retrained for up to 6 epochs, until 98 % of its accuracy is regained.
What it keeps is the accuracy after retraining over that before pruning. Random structures are connected Watts-Strogatz
and Barabasi-Albert graphs of 5 to 20 nodes, 8 a seed, each a GRU trained for 4 epochs at 1e-2; the forest is judged by
cross-validation over the graphs of all seeds.

Until 21 November 2026 the strings were embedded ones, which the thesis does not use: the tanh RNN learned little (64 %)
and the structures nothing (all but two of 24 below 57 %), so that nothing could be shown about either; 72 % of the
test strings stood in training, too; graphs had up to 50 nodes, and a run took 12 minutes. In the thesis the tanh RNN
keeps its accuracy at 80 % before retraining and the LSTM only at 60 %, so that one part of the figure, which stands as
it was set, is the opposite of what the thesis found.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import fmean

import networkx as nx
import numpy as np
import torch
from torch import Tensor, nn

from torchgraft.bench.reber import plain_reber_strings
from torchgraft.claims.record import ClaimRecord, judge
from torchgraft.shrink.prune.sparse_rnn_study import (
    CARD,
    ArbitraryStructureRNN,
    graph_properties,
    property_importance,
    prune_rnn,
    regain_curve,
)

__all__ = ["run"]

_UNITS, _WIDTH, _BATCH, _LR, _GRAPH_LR = 48, 16, 32, 3e-3, 1e-2
_TRAIN, _TEST, _LONGEST, _EPOCHS, _RETRAIN, _GRAPHS, _GRAPH_EPOCHS = 1600, 400, 18, 15, 6, 8, 4
_KINDS = {"tanh RNN": nn.RNN, "GRU": nn.GRU, "LSTM": nn.LSTM}

Data = tuple[Tensor, Tensor, Tensor]


class _Classifier(nn.Module):
    def __init__(self, recurrent: nn.Module, size: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(27, _WIDTH, padding_idx=0)
        self.recurrent = recurrent
        self.head = nn.Linear(size, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Classify by the state at the last true symbol."""
        states = self.recurrent(self.embed(x))
        states = states[0] if isinstance(states, tuple) else states
        out: Tensor = self.head(states[torch.arange(len(x)), lengths - 1])
        return out


class _Run:
    """A classifier, its optimiser and its data."""

    def __init__(self, model: _Classifier, train: Data, test: Data, seed: int, *, lr: float = _LR) -> None:
        self.model, self.train, self.test = model, train, test
        self.draw = torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=lr)

    def epoch(self) -> None:
        """Train for one epoch."""
        x, lengths, y = self.train
        for rows in torch.split(torch.randperm(len(x), generator=self.draw), _BATCH):
            loss = nn.functional.cross_entropy(self.model(x[rows], lengths[rows]), y[rows])
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
            self.optimizer.step()

    def score(self) -> float:
        """Return the accuracy on unseen strings."""
        x, lengths, y = self.test
        with torch.no_grad():
            return float((self.model(x, lengths).argmax(-1) == y).float().mean())


def _graph(draw: np.random.Generator) -> nx.Graph:
    while True:
        nodes, seed = int(draw.integers(5, 21)), int(draw.integers(2**31))
        if draw.random() < 0.5:
            graph = nx.watts_strogatz_graph(nodes, int(draw.integers(2, 5)), float(draw.random()), seed=seed)
        else:
            graph = nx.barabasi_albert_graph(nodes, int(draw.integers(1, 5)), seed=seed)
        if nx.is_connected(graph):
            return graph


Graphs = list[tuple[dict[str, float], float]]


def _measured(seed: int) -> tuple[dict[str, float], Graphs]:
    """Return what the pruned networks keep, and (properties, accuracy) of the random structures."""
    found: dict[str, float] = {}
    x, lengths, y = plain_reber_strings(_TRAIN + _TEST, seed=seed, longest=_LONGEST)
    train, test = (x[:_TRAIN], lengths[:_TRAIN], y[:_TRAIN]), (x[_TRAIN:], lengths[_TRAIN:], y[_TRAIN:])
    for kind, build in _KINDS.items():
        torch.manual_seed(seed)
        whole = _Run(_Classifier(build(_WIDTH, _UNITS, batch_first=True), _UNITS), train, test, seed)
        for _ in range(_EPOCHS):
            whole.epoch()
        before, state = whole.score(), {k: v.clone() for k, v in whole.model.state_dict().items()}
        found[f"{kind}: accuracy"] = before
        for percent in (60, 70, 80):
            model = _Classifier(build(_WIDTH, _UNITS, batch_first=True), _UNITS)
            model.load_state_dict(state)
            prune_rnn(model, float(percent))
            pruned = _Run(model, train, test, seed)
            curve, regained = regain_curve(pruned.epoch, pruned.score, 0.98 * before, epochs=_RETRAIN)
            found[f"{kind}: kept at {percent} %, before retraining"] = curve[0] / before
            found[f"{kind}: kept at {percent} %"] = max(curve) / before
            found[f"{kind}: epochs to regain at {percent} %"] = float(_RETRAIN + 1 if regained is None else regained)
    draw = np.random.default_rng(seed)
    graphs: Graphs = []
    for _ in range(_GRAPHS):
        graph = _graph(draw)
        torch.manual_seed(seed)
        structure = ArbitraryStructureRNN(graph, _WIDTH, mode="GRU")
        made = _Run(_Classifier(structure, len(structure.nodes[-1])), train, test, seed, lr=_GRAPH_LR)
        for _ in range(_GRAPH_EPOCHS):
            made.epoch()
        graphs.append((graph_properties(graph), made.score()))
    return found, graphs


def run(seeds: Sequence[int] = (0, 1, 2)) -> ClaimRecord:
    """Run the claim; about half a minute a seed.

    Args:
        seeds: weights, strings and graphs.
    """
    begun = time.perf_counter()
    with torch.random.fork_rng():
        measured = [_measured(seed) for seed in seeds]
    metrics = {name: [round(each[name], 4) for each, _ in measured] for name in measured[0][0]}
    results = [graph for _, graphs in measured for graph in graphs]
    metrics["random structures: accuracy"] = [round(accuracy, 4) for _, accuracy in results]
    forest = property_importance(results)
    mean = {name: fmean(values) for name, values in metrics.items()}
    gated = [mean[f"{kind}: kept at {percent} %"] for kind in ("GRU", "LSTM") for percent in (60, 70, 80)]
    epochs = [mean[f"{kind}: epochs to regain at {percent} %"] for kind in ("GRU", "LSTM") for percent in (60, 70, 80)]
    at_80 = {kind: mean[f"{kind}: kept at 80 %, before retraining"] for kind in _KINDS}
    strongest = next(iter(forest.importance))
    return judge(
        CARD.key,
        CARD.claim.figure if CARD.claim else "",
        metrics=metrics,
        effects={
            "least kept, GRU and LSTM": min(gated),
            "most epochs to regain": max(epochs),
            "kept by tanh at 80 %, before retraining": at_80["tanh RNN"],
            "kept by the worse gated one": min(at_80["GRU"], at_80["LSTM"]),
            "R2 of the forest": forest.r2,
            f"correlation of accuracy with {strongest}": forest.correlation[strongest],
        },
        parts={
            "GRU and LSTM keep 98 %": min(gated) >= 0.98,
            "regained within 2 epochs": max(epochs) <= 2.0,
            "tanh keeps less at 80 %": at_80["tanh RNN"] < min(at_80["GRU"], at_80["LSTM"]),
            "R2 above 0.5": forest.r2 > 0.5,
        },
        seeds=seeds,
        seconds=time.perf_counter() - begun,
    )
