"""Sparse recurrent networks: exact pruning that holds, structures from graphs, and the grammar."""

from __future__ import annotations

import itertools
from typing import Any

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torchgraft.bench.reber import accepts, plain_reber_strings, reber_strings
from torchgraft.errors import BadInput
from torchgraft.shrink.prune.sparse_rnn_study import (
    ArbitraryStructureRNN,
    graph_properties,
    layered,
    property_importance,
    prune_rnn,
    regain_curve,
)

SYMBOLS = ".BTSXPVEACDFGHIJKLMNOQRUWYZ"


def _network() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"embed": nn.Embedding(8, 6), "rnn": nn.LSTM(6, 10, num_layers=2), "head": nn.Linear(10, 2)})


@pytest.mark.parametrize("percent", [0.0, 33.0, 80.0, 100.0])
@pytest.mark.parametrize(("i2h", "h2h"), [(True, True), (True, False), (False, True)])
def test_as_many_weights_go_as_asked_and_one_threshold_parts_them(percent: float, i2h: bool, h2h: bool) -> None:
    model = _network()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    masks = prune_rnn(model, percent, i2h=i2h, h2h=h2h)
    assert any("weight_ih" in name for name in masks) == i2h
    assert any("weight_hh" in name for name in masks) == h2h
    assert all(name.startswith("rnn.") for name in masks)
    kept = torch.cat([before[name][mask].abs() for name, mask in masks.items()])
    gone = torch.cat([before[name][~mask].abs() for name, mask in masks.items()])
    assert abs(len(gone) - percent / 100 * (len(kept) + len(gone))) <= 1
    if len(kept) and len(gone):
        assert float(kept.min()) >= float(gone.max())
    for name, value in model.named_parameters():
        expected = before[name] * masks[name] if name in masks else before[name]
        assert torch.equal(value, expected)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda values: torch.optim.SGD(values, lr=0.1, momentum=0.9, weight_decay=0.01),
        lambda values: torch.optim.AdamW(values, lr=0.01, weight_decay=0.1),
    ],
)
def test_pruned_weights_stay_zero_while_the_others_learn(optimizer: Any) -> None:
    model = _network()
    masks = prune_rnn(model, 70.0)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    steps = optimizer(model.parameters())
    for _ in range(4):
        steps.zero_grad()
        out = model["rnn"](model["embed"](torch.randint(8, (5, 3))))[0]
        model["head"](out).square().mean().backward()
        steps.step()
    for name, mask in masks.items():
        value = model.get_parameter(name)
        assert not value[~mask].any()
        assert not torch.equal(value, before[name])


def test_a_regain_curve_ends_where_the_target_is_reached() -> None:
    level = iter([0.1, 0.2, 0.3])
    assert regain_curve(lambda: None, lambda: next(level), 0.9, epochs=2) == ([0.1, 0.2, 0.3], None)
    assert regain_curve(lambda: None, lambda: 1.0, 0.9) == ([1.0], 0)


@pytest.mark.parametrize(("mode", "kind"), [("RNN_TANH", nn.RNN), ("GRU", nn.GRU), ("LSTM", nn.LSTM)])
def test_complete_neighbouring_layers_are_torchs_stacked_network(mode: Any, kind: type[nn.RNNBase]) -> None:
    sizes = (3, 4, 2)
    places = [list(range(sum(sizes[:i]), sum(sizes[: i + 1]))) for i in range(3)]
    graph = nx.Graph(pair for one, other in itertools.pairwise(places) for pair in itertools.product(one, other))
    torch.manual_seed(0)
    model = ArbitraryStructureRNN(graph, 5, mode=mode).double()
    assert model.nodes == places
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    read: Tensor = x
    for number, layer in enumerate(model.layers):
        stacked = kind(read.shape[-1], sizes[number], batch_first=True).double()
        weights = dict(layer.named_parameters())
        with torch.no_grad():
            for name, value in stacked.named_parameters():
                given = weights[name]
                # Beyond the second layer the matrix has columns for all earlier layers; the last are the neighbour's.
                value.copy_(given[:, -value.shape[1] :] if name == "weight_ih_l0" else given)
        read = stacked(read)[0]
    torch.testing.assert_close(model(x), read, rtol=1e-12, atol=1e-12)


def test_a_skipping_edge_carries_a_signal_and_a_missing_one_does_not() -> None:
    graph = nx.Graph([(0, 1), (1, 2), (0, 3), (2, 3)])  # 0 -> 3 skips two layers; 1 -> 3 is no edge
    model = ArbitraryStructureRNN(graph, 2, mode="GRU")
    assert model.nodes == [[0], [1], [2], [3]]
    assert model.layers[3].mask[0].tolist() == [1.0, 0.0, 1.0]  # type: ignore[index, union-attr]
    model(torch.randn(1, 3, 2)).sum().backward()
    grad = model.layers[3].weight_ih_l0.grad
    assert isinstance(grad, Tensor)
    assert not grad[:, 1].any()
    assert bool(grad[:, [0, 2]].any(0).all())


@given(st.integers(2, 12), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_every_edge_leads_to_a_higher_layer(nodes: int, seed: int) -> None:
    graph = nx.gnp_random_graph(nodes, 0.4, seed=seed)
    layers = layered(graph)
    layer = {node: number for number, members in enumerate(layers) for node in members}
    assert sorted(layer) == sorted(graph.nodes)
    assert all(layers)
    for one, other in graph.edges:
        low, high = sorted((one, other))
        assert layer[low] < layer[high]
    for node, number in layer.items():
        assert number == max((layer[other] + 1 for other in graph.neighbors(node) if other < node), default=0)


def test_graph_properties_by_hand() -> None:
    path = graph_properties(nx.path_graph(3))
    assert path["diameter"] == 2.0
    assert path["density"] == pytest.approx(2 / 3)
    assert path["average shortest path"] == pytest.approx(4 / 3)
    assert path["degree, mean"] == pytest.approx(2 / 3)
    assert path["betweenness, mean"] == pytest.approx(1 / 3)
    assert path["eccentricity, mean"] == pytest.approx(5 / 3)
    assert path["eccentricity, variance"] == pytest.approx(2 / 9)
    whole = graph_properties(nx.complete_graph(5))
    assert (whole["density"], whole["closeness, mean"], whole["closeness, variance"]) == (1.0, 1.0, 0.0)
    parted = graph_properties(nx.Graph([(0, 1), (2, 3), (3, 4)]))
    assert parted["diameter"] == 2.0


def test_a_forest_finds_what_accuracy_depends_on_and_says_so_on_unseen_graphs() -> None:
    torch.manual_seed(0)
    numbers = torch.rand(60, 3).tolist()
    true = [({"a": a, "b": b, "c": c}, 2 * b + 0.1 * a) for a, b, c in numbers]
    found = property_importance(true)
    assert next(iter(found.importance)) == "b"
    assert found.r2 > 0.7
    assert found.correlation["b"] > 0.9
    noise = property_importance([({"a": a, "b": b}, c) for a, b, c in numbers])
    assert noise.r2 < 0.3
    constant = property_importance([({"a": 1.0, "b": b}, b) for _, b, _ in numbers])
    assert constant.correlation["a"] == 0.0
    flat = property_importance([({"a": a, "b": b}, 0.5) for a, b, _ in numbers])
    assert flat.r2 == 0.0  # networks that all learned nothing are not explained perfectly


def _strings(count: int, seed: int) -> list[tuple[str, int]]:
    x, lengths, labels = reber_strings(count, seed=seed)
    return [
        ("".join(SYMBOLS[int(symbol)] for symbol in row[:length]), int(label))
        for row, length, label in zip(x, lengths, labels, strict=True)
    ]


def test_labels_are_what_the_grammar_says() -> None:
    made = _strings(200, 0)
    assert all(accepts(text) == bool(label) for text, label in made)
    assert sum(label for _, label in made) == 100
    assert len({text for text, _ in made}) > 100
    assert made == _strings(200, 0) != _strings(200, 1)
    swapped = [t for t, label in made if not label and accepts(t[:-2] + ("P" if t[-2] == "T" else "T") + "E")]
    assert 30 < len(swapped) < 80  # about half differ from an accepted string in the embedded symbol alone


def test_plain_strings_are_all_different_and_lengths_tell_nothing() -> None:
    x, lengths, labels = plain_reber_strings(400, longest=16)
    texts = ["".join(SYMBOLS[int(symbol)] for symbol in row[:length]) for row, length in zip(x, lengths, strict=True)]
    assert len(set(texts)) == 400
    assert [accepts(f"BT{text}TE") for text in texts] == labels.bool().tolist()  # plain ones are what is embedded
    assert torch.equal(lengths[::2], lengths[1::2])
    assert int(lengths.max()) <= 16
    assert labels.tolist() == [1, 0] * 200
    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    swapped = [right[1] != wrong[1] and wrong[1] in "TP" and right[2:] == wrong[2:] for right, wrong in pairs]
    assert 70 < sum(swapped) < 130  # about half go on in the wrong branch, the others are in other letters throughout
    for (right, wrong), branch in zip(pairs, swapped, strict=True):
        code = dict(zip(right[1:-1], wrong[1:-1], strict=True))
        assert branch or (wrong[0], wrong[-1]) == ("B", "E")
        assert branch or wrong[1:-1] == "".join(code[symbol] for symbol in right[1:-1])
    assert sum(any(letter not in "BTSXPVE" for letter in wrong) for _, wrong in pairs) > 70
    assert not torch.equal(x, plain_reber_strings(400, seed=1, longest=16)[0])
    for wrong in (3, 40_000):
        with pytest.raises(BadInput, match="count must be even and at most"):
            plain_reber_strings(wrong, longest=16)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("BTBTXSETE", True),
        ("BPBTXSEPE", True),
        ("BPBTXSETE", False),
        ("BTBPVVETE", True),
        ("BTBTSSXXTVVETE", True),
        ("BTBTXSE", False),
        ("", False),
        ("BTTE", False),
        ("BTBTXSETEE", False),
    ],
)
def test_the_grammar_by_hand(text: str, right: bool) -> None:
    assert accepts(text) is right


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: prune_rnn(nn.GRU(2, 2), 101.0),
        lambda: prune_rnn(nn.GRU(2, 2), 50.0, i2h=False, h2h=False),
        lambda: prune_rnn(nn.Linear(2, 2), 50.0),
        lambda: ArbitraryStructureRNN(nx.Graph(), 2),
        lambda: ArbitraryStructureRNN(nx.path_graph(2), 2, mode="GRUU"),  # type: ignore[arg-type]
        lambda: ArbitraryStructureRNN(nx.path_graph(2), 2)(torch.zeros(1, 3, 5)),
        lambda: property_importance([({"a": 1.0}, 1.0)]),
        lambda: property_importance([({"a": 1.0}, 1.0)] * 5 + [({"b": 1.0}, 1.0)]),
        lambda: reber_strings(2, longest=5),
    ],
)
def test_what_cannot_be_is_refused(wrong: Any) -> None:
    with pytest.raises(BadInput):
        wrong()
