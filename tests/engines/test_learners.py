"""Layers as sums of learners: all together one dense layer, gathered rows a loop, costs what was run."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from torchgraft.bench.meters import macs
from torchgraft.bench.models import VisionTransformer
from torchgraft.engines.learners import ACM, acmize, start_from_layers
from torchgraft.errors import BadInput


def acm(**changes: object) -> ACM:
    torch.manual_seed(0)
    made = ACM(6, 5, learners=3, hidden=4, **changes).double().eval()  # type: ignore[arg-type]
    with torch.no_grad():
        made.biases.normal_()
    return made


def rows(count: int = 7) -> Tensor:
    return torch.randn(count, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_hand(made: ACM, x: Tensor, count: int) -> Tensor:
    """h_n, one learner and one neuron slice at a time."""
    total = made.biases[0].expand(len(x), -1).clone()
    for n in range(count):
        part = slice(n * 4, (n + 1) * 4)
        inner = F.gelu(x @ made.up.weight[part].T + made.up.bias[part])
        total = total + inner @ made.down.weight[:, part].T + made.biases[n + 1]
    return total


def test_all_learners_are_one_dense_layer() -> None:
    made, x = acm(), rows()
    made.mode = "all"
    dense = made.down(F.gelu(made.up(x))) + made.biases.sum(0)
    assert torch.allclose(made(x), dense, atol=1e-12)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_a_number_of_learners_a_constant_gate_and_the_partial_sums_agree(count: int) -> None:
    made, x = acm(), rows()
    made.mode = count
    fixed = made(x)
    assert torch.allclose(fixed, by_hand(made, x, count), atol=1e-12)
    assert torch.allclose(made.partial_sums(x)[count], fixed, atol=1e-12)
    made.mode = "gated"
    with torch.no_grad():
        made.gate[2].weight.zero_()
        made.gate[2].bias.copy_(10.0 * F.one_hot(torch.tensor(count), 4))
    assert torch.allclose(made(x), fixed, atol=1e-12)
    assert made.spent == len(x) * count * made.learner_macs == len(x) * count * 4 * (6 + 5)


def test_choices_by_token_equal_a_loop_and_are_what_is_counted() -> None:
    made, x = acm(), rows(40)
    with torch.no_grad():
        made.gate[2].weight.mul_(20)
    choice = made.scores(x).argmax(-1)
    assert len(choice.unique()) >= 3
    wanted = torch.cat([by_hand(made, x[i : i + 1], int(choice[i])) for i in range(40)])
    assert torch.allclose(made(x), wanted, atol=1e-12)
    assert torch.allclose(made(x.view(4, 10, 6)), wanted.view(4, 10, 5), atol=1e-12)
    assert made.spent == int(choice.sum()) * 44
    assert macs(made, x) == made.spent + len(x) * made.gate_macs


def test_a_price_lowers_the_choices_and_least_holds() -> None:
    made, x = acm(least=1), rows(40)
    spent = []
    for price in (-100.0, 0.0, 0.05, 100.0):
        made.price = price
        made(x)
        spent.append(made.spent / 44 / 40)
    assert spent[0] == 3
    assert spent[-1] == 1
    assert sorted(spent, reverse=True) == spent


def test_a_sample_in_training_is_the_sum_that_it_chose() -> None:
    made, x = acm(), rows(30)
    made.train()
    out = made(x)
    assert made.sample is not None
    wanted = torch.einsum("mn,nmf->mf", made.sample, made.partial_sums(x))
    assert torch.allclose(out, wanted, atol=1e-12)
    out.sum().backward()
    grad = made.gate[0].weight.grad
    assert isinstance(grad, Tensor)
    assert bool(grad.any())


def test_learners_start_as_the_layers_that_they_stand_for() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(d_model=32, depth=2, num_heads=2).double().eval()
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    elastic = acmize(model, x, learners=4)
    start_from_layers(elastic, x)
    assert torch.equal(elastic(x), model(x))
    assert sorted(elastic.places) == sorted(
        f"blocks.{i}.{part}" for i in range(2) for part in ("attn.query", "attn.key", "attn.value", "attn.out", "mlp")
    )
    tokens = torch.randn(9, 32, dtype=torch.float64)
    for name, place in elastic.places.items():
        place.acm.mode = "all"
        gap = float(
            (place.acm(tokens) - place.original(tokens)).norm().detach() / place.original(tokens).norm().detach()
        )
        if name.endswith("mlp"):
            assert gap < 1e-12
        else:  # half the rank of a square matrix costs as much as the matrix, and is the best of that rank
            singular = torch.linalg.svdvals(place.original.weight)
            assert 0.05 < gap < 1.0
            approximation = place.acm.down.weight @ place.acm.up.weight
            found = torch.linalg.matrix_norm(approximation - place.original.weight)
            assert torch.allclose(found, singular[16:].square().sum().sqrt(), atol=1e-10)


def test_ignored_layers_stay_also_inside_a_feed_forward_layer() -> None:
    torch.manual_seed(0)
    model, x = VisionTransformer(d_model=32, depth=1, num_heads=2).eval(), torch.randn(2, 1, 8, 8)
    made = acmize(model, x, ignore=("blocks.0.mlp.fc2", "*.attn"))
    assert list(made.places) == ["blocks.0.mlp.fc1"]


def test_a_copy_can_be_made_after_training_mode() -> None:
    made, x = acm(), rows()
    made.train()
    made(x)
    made.eval()
    made(x)
    assert torch.equal(copy.deepcopy(made)(x), made(x))


@pytest.mark.parametrize("bad", [{"learners": 0}, {"hidden": -1}, {"activation": "sine"}, {"least": 5}])
def test_bad_settings_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(BadInput):
        ACM(6, 5, **bad)  # type: ignore[arg-type]


def test_bad_shapes_and_modes_are_refused() -> None:
    made = acm()
    with pytest.raises(BadInput, match="6 inputs"):
        made(torch.zeros(2, 5, dtype=torch.float64))
    made.mode = 4
    with pytest.raises(BadInput, match="mode"):
        made(rows())
    with pytest.raises(BadInput, match="no feed-forward"):
        acmize(torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.zeros(1, 2))
