"""Activating while pruning: exact counts, what goes by sign and movement, monotone dead rates, nets built by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torchgraft.engines.masks import magnitude, prunable
from torchgraft.engines.sparse_training import remove_lowest
from torchgraft.errors import BadInput
from torchgraft.shrink.prune.activate_while_pruning import HOSTS, ActivatingPruner, activating_masks, dead_neuron_rate

Tensors = dict[str, Tensor]


def _weights(seed: int, left: float = 1.0) -> tuple[Tensors, Tensors, Tensors]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (13, 7), "b": (5, 13)}
    masks = {n: torch.rand(s, generator=generator) < left for n, s in shapes.items()}
    start = {n: torch.where(masks[n], torch.randn(s, generator=generator), 0.0) for n, s in shapes.items()}
    end = {n: torch.where(masks[n], w + torch.randn(w.shape, generator=generator), 0.0) for n, w in start.items()}
    return end, start, masks


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 999),
    left=st.sampled_from([0.1, 0.5, 1.0]),
    p=st.floats(0, 60),
    part=st.floats(0, 0.5),
    host=st.sampled_from(sorted(HOSTS)),
)
def test_counts_are_exact_and_what_goes_is_negative_and_slow(
    seed: int, left: float, p: float, part: float, host: str
) -> None:
    end, start, masks = _weights(seed, left)
    q = p * part
    n = sum(int(m.sum()) for m in masks.values())
    found = ActivatingPruner(host, p=p, q=q).masks(end, start, masks)
    by_host, by_sign = round((p - q) / 100 * n), round(q / 100 * n)
    assert n - sum(int(m.sum()) for m in found.values()) == by_host + by_sign
    assert all((masks[name] | ~m).all() for name, m in found.items())
    scores = HOSTS[host]({name: torch.where(m, end[name], 0.0) for name, m in masks.items()})
    alone = remove_lowest(scores, masks, by_host)
    negative = sum(int((alone[name] & (end[name] < 0)).sum()) for name in masks)
    if negative >= by_sign:
        gone = {name: alone[name] & ~found[name] for name in masks}
        assert sum(int(m.sum()) for m in gone.values()) == by_sign
        assert all((end[name][m] < 0).all() for name, m in gone.items())
        moved = {name: (end[name] - start[name]).abs() for name in masks}
        fastest = torch.cat([moved[name][m] for name, m in gone.items()])
        left_over = torch.cat([moved[name][found[name] & (end[name] < 0)] for name in masks])
        if len(fastest) and len(left_over):
            assert fastest.max() <= left_over.min()


def test_q_of_zero_is_the_host_bit_for_bit() -> None:
    end, start, masks = _weights(1, 0.5)
    n = sum(int(m.sum()) for m in masks.values())
    host = remove_lowest(magnitude(end), masks, round(0.2 * n))
    found = activating_masks(end, start, masks, q=0.0)
    assert all(torch.equal(found[name], host[name]) for name in host)
    other = activating_masks(end, start, masks, q=5.0)
    assert any(not torch.equal(other[name], host[name]) for name in host)


def test_movement_is_measured_from_the_start_of_the_cycle() -> None:
    ones = {"w": torch.ones(4, dtype=torch.bool)}
    end = {"w": torch.tensor([-5.0, -6.0, -7.0, 8.0])}
    near_last = activating_masks(end, {"w": torch.tensor([0.0, 0.0, -6.9, 8.0])}, ones, p=25, q=25)
    near_first = activating_masks(end, {"w": torch.tensor([-5.1, 0.0, 0.0, 8.0])}, ones, p=25, q=25)
    assert near_last["w"].tolist() == [True, True, False, True]
    assert near_first["w"].tolist() == [False, True, True, True]


def test_where_negative_weights_run_out_the_host_takes_the_rest() -> None:
    end = {"w": torch.tensor([1.0, -2.0, 3.0, 4.0])}
    found = activating_masks(end, {"w": torch.zeros(4)}, {"w": torch.ones(4, dtype=torch.bool)}, p=50, q=50)
    assert found["w"].tolist() == [False, False, True, True]


def test_cycles_rewind_and_follow_the_counts() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 10))
    x, y = torch.randn(40, 10), torch.randint(0, 10, (40,))

    def run(net: nn.Module, stop: int | None) -> None:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()

    found = ActivatingPruner(p=20, q=5).prune(model, run, 3)
    left, counts = 400, []
    for _ in range(3):
        counts.append(left)
        left -= round(0.15 * left) + round(0.05 * left)
    assert [sum(int(m.sum()) for m in one.masks.values()) for one in found.rounds] == counts
    assert sum(int(m.sum()) for m in found.masks.values()) == left
    first = prunable(model)
    assert all(torch.equal(w, torch.where(found.masks[n], first[n], 0.0)) for n, w in prunable(found.ticket()).items())


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999))
def test_zeroing_a_negative_weight_never_kills(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(6, 9).double()
    x = torch.rand(16, 6, generator=generator, dtype=torch.float64)  # not negative
    model = nn.Sequential(layer, nn.ReLU())
    with torch.no_grad():
        layer.weight.copy_(torch.randn(9, 6, generator=generator))
        layer.bias.copy_(torch.randn(9, generator=generator))
        before, rate = layer(x), dead_neuron_rate(model, [(x, x)]).total
        negative = (layer.weight < 0).nonzero()
        row, column = negative[int(torch.randint(len(negative), (), generator=generator))].tolist()
        layer.weight[row, column] = 0.0
        assert (layer(x) >= before).all()
        assert dead_neuron_rate(model, [(x, x)]).total <= rate


def test_dead_rates_of_a_net_built_by_hand() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 2)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]))
        model[0].bias.copy_(torch.tensor([0.0, 0.0, -1.0, 1.0]))  # the third is dead, the fourth alive, both unfed
        model[2].weight.copy_(torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))
        model[2].bias.copy_(torch.tensor([-2.0, 0.0]))
    x = torch.tensor([[1.0, 0.0], [-3.0, 0.0]], dtype=torch.float64)
    # first layer: x=1 -> (1, 0, 0, 1), x=-3 -> (0, 3, 0, 1): dead 4 of 8, 2 of them unfed
    # second: x=1 -> (-1 -> 0, 0), x=-3 -> (1, 0): dead 3 of 4, 2 of them unfed
    found = dead_neuron_rate(model, [(x[:1], x[:1]), (x[1:], x[1:])])
    assert found.layers == ((4 / 8, 2 / 8), (3 / 4, 2 / 4))
    assert found.total == 7 / 12
    assert found.static == 4 / 12
    assert found.dynamic == pytest.approx(3 / 12)
    assert dead_neuron_rate(model, [(x, x)]) == found


class _Functional(nn.Module):
    """Every way of writing a ReLU, behind a convolution with a batch norm in between."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.fc = nn.Linear(3, 4)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.conv(x))).mean(dim=(2, 3))
        return torch.relu(self.fc(y)) + self.fc(y).relu() + self.act(self.fc(y))


def test_every_relu_is_seen_and_conv_channels_are_neurons_at_every_place() -> None:
    torch.manual_seed(0)
    model = _Functional()
    with torch.no_grad():
        model.conv.weight[1] = 0.0
        model.conv.bias[1] = -1.0  # type: ignore[index]
        model.norm.running_mean.zero_()  # type: ignore[union-attr]
    model.train()
    x = torch.randn(5, 1, 6, 6)
    found = dead_neuron_rate(model, [(x, x)])
    assert model.training
    assert len(found.layers) == 4
    assert found.layers[0][1] == pytest.approx(1 / 3)
    assert found.layers[1] == found.layers[2] == found.layers[3]
    with torch.no_grad():
        model.eval()
        zero = F.relu(model.norm(model.conv(x))) == 0
        assert found.layers[0][0] == pytest.approx(float(zero.float().mean()))


def test_bad_settings_are_refused() -> None:
    for wrong in ({"p": 10, "q": 11}, {"p": 100}, {"q": -1}):
        with pytest.raises(BadInput, match="shares need"):
            ActivatingPruner(**wrong)
        with pytest.raises(BadInput, match="shares need"):
            activating_masks({}, {}, {}, **wrong)
    with pytest.raises(BadInput, match=r"unknown host 'magnitud'.*magnitude"):
        ActivatingPruner("magnitud")
    with pytest.raises(BadInput, match="needs a batch"):
        dead_neuron_rate(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), [])
    with pytest.raises(BadInput, match="needs a batch"):
        dead_neuron_rate(nn.Linear(2, 2), [(torch.ones(1, 2), torch.ones(1))])
