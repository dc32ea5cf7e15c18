"""Sparse recurrent networks: exact pruning that holds, structures from graphs, and the grammar."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torchgraft.bench.meters import measure, size
from torchgraft.bench.reber import accepts, plain_reber_strings, reber_strings
from torchgraft.bench.task import Task
from torchgraft.catalogue import registry
from torchgraft.contracts.subjects import case
from torchgraft.engines import recipe
from torchgraft.engines.distill import distill
from torchgraft.engines.procedure import Procedure
from torchgraft.engines.sparse.stored import HoldSparse, SparseLSTM, SparseRecurrent
from torchgraft.engines.surgery.edits import apply_edits, history
from torchgraft.errors import BadInput
from torchgraft.fit.plan import check_combination, make_plan
from torchgraft.fit.workshop import LAST
from torchgraft.shrink.prune.sparse_rnn_study import (
    CARD,
    ArbitraryStructureRNN,
    RecurrentPruning,
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


# The lever of fit.


class _Classifier(nn.Module):
    """Tokens, an embedding, recurrent layers, two linear layers on the last state."""

    def __init__(self, layer: Callable[..., nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.rnn = layer(16, 32, **options)
        self.first = bool(options.get("batch_first"))
        self.hidden = nn.Linear(64 if options.get("bidirectional") else 32, 48)
        self.head = nn.Linear(48, 3)

    def forward(self, x: Tensor) -> Tensor:
        read = self.embed(x)
        states, _ = self.rnn(read if self.first else read.transpose(0, 1))
        last = states[:, -1] if self.first else states[-1]
        out: Tensor = self.head(self.hidden(last).relu())
        return out


KINDS: dict[str, Callable[[], _Classifier]] = {
    "lstm": lambda: _Classifier(nn.LSTM, batch_first=True),
    "lstm-deep": lambda: _Classifier(nn.LSTM, num_layers=2, bidirectional=True),
    "gru": lambda: _Classifier(nn.GRU, num_layers=2, bidirectional=True, batch_first=True),
    "rnn": lambda: _Classifier(nn.RNN),
}


def _classifier(kind: str = "lstm", seed: int = 0) -> _Classifier:
    torch.manual_seed(seed)
    return KINDS[kind]().eval()


def _task(model: nn.Module) -> Task:
    draw = torch.Generator().manual_seed(3)
    x = torch.randint(20, (64, 9), generator=draw)
    y = (x[:, :3].sum(1) % 3).long()
    loss = nn.functional.cross_entropy
    return Task(lambda: model, (x, y), (x, y), (x, y), loss, lambda out, t: (out.argmax(1) == t).float(), batch_size=16)


def _sparse_part(model: nn.Module) -> SparseRecurrent:
    layer = model.get_submodule("rnn")
    assert isinstance(layer, SparseRecurrent)
    return layer


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("strength", [0.25, 0.5, 1.0])
def test_each_matrix_keeps_its_largest_weights_and_what_else_there_is_stays(kind: str, strength: float) -> None:
    model = _classifier(kind)
    pruned = RecurrentPruning().apply(model, _task(model), strength)
    layer = _sparse_part(pruned)
    share = 0.02**strength
    for name, value in model.named_parameters():
        if "weight_ih" not in name and "weight_hh" not in name:
            assert torch.equal(pruned.get_parameter(name), value)
            continue
        found = getattr(layer, name.removeprefix("rnn.")).detach()
        value, kept = value.detach(), found != 0
        assert int(kept.sum()) == round(share * value.numel())
        assert torch.equal(found[kept], value[kept])
        assert float(value[kept].abs().min()) >= float(value[~kept].abs().max())
    assert pruned(torch.zeros(2, 5, dtype=torch.long)).isfinite().all()


def test_of_equal_weights_exactly_as_many_go_as_asked() -> None:
    model = _classifier()
    with torch.no_grad():
        model.rnn.weight_hh_l0.fill_(0.5)
    layer = _sparse_part(RecurrentPruning(most=0.9).apply(model, _task(model), 1.0))
    assert int((layer.weight_hh_l0 != 0).sum()) == round(0.1 * 128 * 32)
    assert bool((layer.weight_hh_l0.flatten()[:410] == 0.5).all())


def test_pooled_weights_have_one_threshold_and_kinds_can_be_chosen() -> None:
    model = _classifier()
    with torch.no_grad():
        model.rnn.weight_ih_l0.mul_(1.5)
    task = _task(model)
    layer = _sparse_part(RecurrentPruning(most=0.8, pooled=True).apply(model, task, 1.0))
    before = {name: getattr(model.rnn, name).detach() for name in ("weight_ih_l0", "weight_hh_l0")}
    kept = {name: getattr(layer, name).detach() != 0 for name in before}
    assert sum(int(mask.sum()) for mask in kept.values()) == round(0.2 * 128 * 48)
    assert int(kept["weight_ih_l0"].sum()) > int(kept["weight_hh_l0"].sum())
    least = min(float(before[name][mask].abs().min()) for name, mask in kept.items())
    assert least >= max(float(before[name][~mask].abs().max()) for name, mask in kept.items())
    for options, name in (({"i2h": False}, "weight_hh_l0"), ({"h2h": False}, "weight_ih_l0")):
        one = RecurrentPruning(**options)
        assert [site.name for site in one.applies_to(model, task)] == [f"rnn.{name}"]
        assert list(one.plan(model, task, 0.5)[0].describe()) == [f"rnn.{name}"]


@pytest.mark.parametrize("kind", list(KINDS))
def test_masks_hold_through_recovery_and_the_file_comes_back_bit_for_bit(kind: str, tmp_path: Path) -> None:
    model = _classifier(kind)
    task = _task(model)
    pruned = RecurrentPruning(most=0.9).apply(model, task, 1.0)
    layer = _sparse_part(pruned)
    names = [name.removesuffix("_values") for name, _ in layer.named_parameters() if name.endswith("_values")]
    before = {name: getattr(layer, name).detach().clone() for name in names}
    distill(pruned, model, task, steps=4, seed=0)
    steps = torch.optim.SGD(pruned.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(3):
        steps.zero_grad()
        task.loss(pruned(task.train.inputs), task.train.target).backward()
        steps.step()
    pruned.eval()
    for name, then in before.items():
        now = getattr(layer, name)
        assert not now[then == 0].any()
        assert not torch.equal(now, then)
    assert size(pruned) == (recipe.save(pruned, tmp_path, task="").parent / "model.safetensors").stat().st_size
    again = recipe.rebuild(recipe.read_recipe(tmp_path), _classifier(kind, seed=9), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(task.val.inputs), pruned(task.val.inputs))
    assert isinstance(again.get_submodule("rnn"), type(layer))


def test_the_file_is_as_small_as_its_kept_values_and_bits() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"rnn": nn.LSTM(64, 128)}).eval()
    pruned = RecurrentPruning(most=0.9).apply(model, _task(model), 1.0)
    weights = 4 * 128 * (64 + 128)
    kept = round(0.1 * 4 * 128 * 64) + round(0.1 * 4 * 128 * 128)
    biases = 2 * 4 * 128
    pattern = kept + 4 * 128 * 64 // 255 + 4 * 128 * 128 // 255  # a byte each: below one in eight gaps are shorter
    assert sum(value.numel() for value in pruned.parameters()) == kept + biases
    assert 4 * (kept + biases) + pattern < size(pruned) < 4 * (kept + biases) + pattern + 1024
    assert size(pruned) < 0.14 * size(model)
    half = RecurrentPruning(most=0.5).apply(model, _task(model), 1.0)
    assert 4 * (weights // 2 + biases) + weights // 8 < size(half) < 4 * (weights // 2 + biases) + weights // 8 + 1024


def test_a_matrix_that_would_not_shrink_stays_as_it_is() -> None:
    model = nn.ModuleDict({"rnn": nn.GRU(2, 2), "large": nn.GRU(32, 32)})
    task = _task(model)
    assert len(RecurrentPruning().applies_to(model, task)) == 4
    pruned = RecurrentPruning().apply(model, task, 1.0)
    assert type(pruned["rnn"]) is nn.GRU  # type: ignore[index]
    assert pruned["large"].sparsity > 0.97  # type: ignore[index]
    barely = RecurrentPruning().apply(model, task, 0.005)
    assert history(barely) == ()
    assert size(barely) == size(model)


def test_nothing_happens_at_strength_zero_and_without_recurrent_layers() -> None:
    model = _classifier()
    task = _task(model)
    same = RecurrentPruning().apply(model, task, 0.0)
    assert history(same) == ()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    plain = case("cnn")
    assert not RecurrentPruning().applies_to(plain.model, plain.task)
    with pytest.raises(BadInput, match="sparse-rnn-study finds nothing to act on in Cnn"):
        RecurrentPruning().apply(plain.model, plain.task, 0.5)
    plan = make_plan(plain.model, plain.task, wanted=["sparse-rnn-study", "svd-truncation"], costs=("size",))
    assert [r.reason for r in plan.refused if r.procedure == "sparse-rnn-study"] == ["it finds nothing to act on"]
    assert "sparse-rnn-study" in make_plan(model, task, costs=("size",)).procedures


def test_what_is_ignored_stays_and_what_is_refused_is_said() -> None:
    model = nn.ModuleDict({"one": nn.LSTM(16, 32), "two": nn.LSTM(16, 32), "three": nn.LSTM(16, 32)}).eval()
    model["two"].weight_hh_l0 = model["one"].weight_hh_l0
    nn.utils.parametrizations.orthogonal(model["three"], "weight_hh_l0")
    task, lever = _task(model), RecurrentPruning()
    assert [site.name for site in lever.applies_to(model, task)] == ["one.weight_ih_l0", "two.weight_ih_l0"]
    reasons = {refusal.name: refusal.reason for refusal in lever.refusals(model, task)}
    assert list(reasons) == ["one.weight_hh_l0", "two.weight_hh_l0", "three.weight_ih_l0", "three.weight_hh_l0"]
    assert "left dense: it is shared with another" in reasons["two.weight_hh_l0"]
    assert "left dense: its layer is parametrised" in reasons["three.weight_hh_l0"]
    assert not lever.refusals(model, task, ignore=["*"])
    changed = lever.apply(model, task, 1.0, ignore=["two"])
    assert isinstance(changed["one"], SparseLSTM)  # type: ignore[index]
    assert type(changed["two"]) is nn.LSTM  # type: ignore[index]
    assert changed["one"].weight_hh_l0 is changed["two"].weight_hh_l0  # type: ignore[index]


#: What may stand on the same model: procedure key -> the modules that it changes beside the recurrent ones.
PARTNERS = ("nupes-power-quant", "int8-dynamic", "quantized-distillation", "svd-truncation", "dycl-compile")


@pytest.mark.parametrize("kind", ["lstm", "lstm-deep", "gru"])
@pytest.mark.parametrize("key", PARTNERS)
def test_it_combines_with_other_procedures(key: str, kind: str, tmp_path: Path) -> None:
    ordered = check_combination([key, "sparse-rnn-study"])
    model = _classifier(kind)
    task = _task(model)
    both: nn.Module = model
    for each in ordered:
        card = registry.lookup(each)
        lever: Procedure = registry.entry(card)()
        lever = lever if card.stage == "execution" else lever.for_costs(("size",))
        assert lever.applies_to(both, task), each
        both = lever.apply(both, task, 0.7)
    alone = RecurrentPruning().apply(model, task, 0.7)
    layer = _sparse_part(both)
    for name, value in _sparse_part(alone).named_parameters():
        assert torch.equal(layer.get_parameter(name), value), name  # neither mask nor values are lost
    if registry.lookup(key).stage not in LAST[1:]:
        assert size(both) < size(alone)
    with torch.no_grad():
        out = both(task.example)
        gap = (out - alone(task.example)).abs().max()
        assert gap < (1e-5 if key == "dycl-compile" else 1.0)
        if key == "dycl-compile":
            assert both.__dict__["forward"].compiled(task.example)
    recipe.save(both, tmp_path, task="")
    again = recipe.rebuild(recipe.read_recipe(tmp_path), _classifier(kind, seed=9), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(task.example), out)
    costs = ("params", "macs", "size")
    assert measure(again, task.example, costs=costs).readings == measure(both, task.example, costs=costs).readings


def test_a_compiled_pass_follows_the_values() -> None:
    model = _classifier()
    task = _task(model)
    pruned = RecurrentPruning().apply(model, task, 0.7)
    compiled = registry.entry(registry.lookup("dycl-compile"))().apply(pruned, task, 1.0)
    with torch.no_grad():
        compiled(task.example)
        assert compiled.__dict__["forward"].compiled(task.example)
        for one in (pruned, compiled):
            _sparse_part(one).get_parameter("weight_hh_l0_values").mul_(3.0)
        torch.testing.assert_close(compiled(task.example), pruned(task.example))


def test_the_contract_runs_on_a_recurrent_model_and_the_card_says_what_is_not_faster() -> None:
    assert CARD.example["model"] == "recurrent"
    tiny = case("recurrent")
    sites = RecurrentPruning().applies_to(tiny.model, tiny.task)
    assert {site.name.partition(".")[0] for site in sites} == {"lstm", "gru", "rnn"}
    assert "executed dense" in HoldSparse(parameters={"a": 1}).describe()["a"]
    assert apply_edits(tiny.model, RecurrentPruning().plan(tiny.model, tiny.task, 1.0))(tiny.inputs).shape == (8, 4)


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
        lambda: RecurrentPruning(most=1.0),
        lambda: RecurrentPruning(most=0.0),
        lambda: RecurrentPruning(i2h=False, h2h=False),
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
