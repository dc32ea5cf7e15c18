"""Separable kernels: two executions that agree, the nearest factors, He's variance, and counts that are honest."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.meters import macs, params
from torchgraft.bench.task import Split, Task
from torchgraft.engines.separable_kernels import SeparableKernelConv2d, SeparableKernelConv3d, SeparateKernels
from torchgraft.engines.surgery.edits import apply_edits
from torchgraft.errors import BadInput
from torchgraft.shrink.factorize.separable_kernel_conv import (
    SeparableKernelConv,
    SeparableKernelConv1d,
    chain_macs,
    compose,
    convert,
    cp_factors,
    from_dense,
)


def _task(model: nn.Module, x: Tensor) -> Task:
    split = Split(x, torch.zeros(len(x), dtype=torch.long))
    return Task(model, split, split, split, F.cross_entropy, lambda out, _: out[:, 0])


@pytest.mark.filterwarnings("ignore:Using padding")
@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([1, 2]),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.one_of(st.tuples(st.integers(0, 3), st.integers(0, 3)), st.just("same"), st.just("valid")),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
)
def test_chained_equals_composed_outputs_and_gradients(
    rank: int, stride: tuple[int, int], padding: tuple[int, int] | str, dilation: tuple[int, int], mode: str
) -> None:
    if padding == "same":
        stride = (1, 1)
    torch.manual_seed(0)
    layer = SeparableKernelConv2d(
        2, 3, (3, 4), rank=rank, stride=stride, padding=padding, dilation=dilation, padding_mode=mode
    ).double()
    x = torch.randn(2, 2, 9, 8, dtype=torch.float64)
    found = {}
    for execution in ("compose", "chain"):
        layer.execution = execution
        out = layer(x)
        found[execution] = [out, *torch.autograd.grad(out.square().sum(), list(layer.parameters()))]
    dense = nn.Conv2d(2, 3, (3, 4), stride=stride, padding=padding, dilation=dilation, padding_mode=mode).double()  # type: ignore[arg-type]
    dense.weight.data, dense.bias.data = layer.weight.detach(), layer.bias.detach()  # type: ignore[union-attr]
    torch.testing.assert_close(found["compose"][0], dense(x), rtol=0, atol=1e-12)
    for one, other in zip(found["compose"], found["chain"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_chained_equals_composed_in_three_axes_and_without_a_batch() -> None:
    torch.manual_seed(0)
    layer = SeparableKernelConv3d(
        2, 3, (3, 2, 5), rank=2, stride=(1, 2, 1), padding=(1, 0, 2), dilation=(2, 1, 1)
    ).double()
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    expected = layer(x)
    layer.execution = "chain"
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer(x[None])[0], expected, rtol=0, atol=1e-12)


def test_compose_by_hand() -> None:
    u = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    v = torch.tensor([[1.0, 0.0], [3.0, 5.0]])
    assert compose([u, v]).tolist() == [[1.0, 0.0], [5.0, 5.0]]


@pytest.mark.parametrize("conv", [nn.Conv2d(3, 4, (3, 5), stride=2, padding=1), nn.Conv1d(3, 4, 5)])
def test_from_dense_at_full_rank_is_the_dense_convolution(conv: nn.Module) -> None:
    conv = conv.double()
    x = torch.randn(2, 3, *(9,) * (conv.weight.ndim - 2), dtype=torch.float64)  # type: ignore[operator]
    made = from_dense(conv, 3 if isinstance(conv, nn.Conv2d) else 1)
    torch.testing.assert_close(made(x), conv(x), rtol=0, atol=1e-12)


def test_error_of_every_kernel_is_that_of_the_dropped_singular_values() -> None:
    torch.manual_seed(0)
    kernels = torch.randn(7, 5, 4, dtype=torch.float64)
    sigma = torch.linalg.svdvals(kernels)
    for rank in (1, 2, 3):
        found = (compose(cp_factors(kernels, rank)) - kernels).flatten(1).norm(dim=1)
        torch.testing.assert_close(found, sigma[:, rank:].square().sum(1).sqrt(), rtol=0, atol=1e-12)


def test_kernels_of_three_axes_that_are_products_are_found() -> None:
    torch.manual_seed(0)
    wanted = [torch.randn(6, 1, k, dtype=torch.float64) for k in (3, 4, 5)]
    kernels = compose(wanted)
    torch.testing.assert_close(compose(cp_factors(kernels, 1)), kernels, rtol=0, atol=1e-6)
    noisy = kernels + 0.1 * torch.randn_like(kernels)
    errors = [float((compose(cp_factors(noisy, rank)) - noisy).norm()) for rank in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.2 * float(kernels.norm())


@pytest.mark.parametrize("rank", [1, 3])
def test_variance_at_the_start_is_he(rank: int) -> None:
    torch.manual_seed(0)
    layer = SeparableKernelConv2d(64, 64, 5, rank=rank)
    he = 2 / (64 * 25)
    assert float(layer.weight.detach().var()) == pytest.approx(he, rel=0.1)
    assert float(SeparableKernelConv3d(64, 64, 3, rank=rank).weight.detach().var()) == pytest.approx(
        2 / (64 * 27), rel=0.1
    )


def test_parameters_are_the_formula() -> None:
    for kernel, rank, formula in ((7, 1, 14), (5, 2, 20), ((3, 5), 1, 8)):
        assert params(SeparableKernelConv2d(6, 4, kernel, rank=rank, bias=False)) == 24 * formula
    assert params(SeparableKernelConv3d(6, 4, 5, bias=False)) == 24 * 15


@pytest.mark.parametrize(("stride", "padding"), [(1, 3), (1, 0), (2, 3)])
def test_counted_macs_are_the_formula(stride: int, padding: int) -> None:
    conv, x = nn.Conv2d(2, 3, 7, stride=stride, padding=padding), torch.zeros(1, 2, 12, 12)
    size = conv(x).shape[-1]
    chained, dense = chain_macs(conv, 1, (12, 12), (size, size))
    assert macs(conv, x) == dense
    assert macs(from_dense(conv, 1), x) == dense  # composed: as before
    assert macs(from_dense(conv, 1, execution="chain"), x) == chained < dense
    assert dense == 2 * 3 * 49 * size**2
    assert chained == 2 * 3 * 7 * (12 * size + size**2)


def test_sites_that_gain_nothing_are_refused() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.Conv2d(4, 4, 2),  # 2 + 2 = 2 x 2
        nn.Conv2d(4, 4, 1),
        nn.Conv2d(4, 4, 3, stride=2, padding=1),  # the chain: 3 x 2 + 3 = 9, no fewer MACs
        nn.Flatten(),
        nn.Linear(64, 3),
    )
    task = _task(model, torch.randn(4, 1, 9, 9))
    composed, chained = SeparableKernelConv(), SeparableKernelConv().for_costs(("macs", "params"))
    assert [site.name for site in composed.applies_to(model, task)] == ["0", "3"]
    assert [site.name for site in chained.applies_to(model, task)] == ["0"]
    assert "MACs" in {refusal.name: refusal.reason for refusal in chained.refusals(model, task)}["3"]
    assert [refusal.name for refusal in composed.refusals(model, task)] == ["1", "2"]
    assert SeparableKernelConv().for_costs(("macs", "latency")).execution == "compose"  # type: ignore[attr-defined]


def test_the_chain_lowers_macs_as_strength_rises() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 7, padding=3), nn.ReLU(), nn.Conv2d(4, 4, 5, padding=2), nn.Flatten(), nn.Linear(256, 3)
    )
    x = torch.randn(4, 1, 8, 8)
    procedure = SeparableKernelConv(execution="chain")
    series = [procedure.apply(model, _task(model, x), strength) for strength in (0.0, 0.3, 0.6, 0.8, 1.0)]
    counts = [(params(each), macs(each, x)) for each in series]
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) >= 4
    assert series[-1][0].rank == series[-1][2].rank == 1  # type: ignore[index]


def test_a_model_whose_kernels_are_products_loses_nothing() -> None:
    torch.manual_seed(0)
    model = convert(nn.Sequential(nn.Conv2d(1, 4, 5), nn.Flatten(), nn.Linear(64, 3))).double()
    dense = nn.Sequential(nn.Conv2d(1, 4, 5), nn.Flatten(), nn.Linear(64, 3)).double()
    dense[0].weight.data, dense[0].bias.data = model[0].weight.detach(), model[0].bias.detach()  # type: ignore[index]
    dense[2].load_state_dict(model[2].state_dict())  # type: ignore[index]
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    changed = SeparableKernelConv().apply(dense, _task(dense, x), 1.0)
    torch.testing.assert_close(changed(x), dense(x), rtol=0, atol=1e-12)


def test_convert_leaves_what_gains_nothing_and_the_original() -> None:
    model = nn.Sequential(nn.Conv3d(1, 4, 3), nn.Conv3d(4, 4, 3, groups=2), nn.Conv3d(4, 4, 1))
    made = convert(model, 2)
    assert [type(layer).__name__ for layer in made.children()] == ["SeparableKernelConv3d", "Conv3d", "Conv3d"]
    assert type(convert(model, 3)[0]) is nn.Conv3d  # type: ignore[index]  # 3 x 9 = 27
    assert type(model[0]) is nn.Conv3d
    assert made(torch.zeros(1, 1, 5, 5, 5)).shape == (1, 4, 1, 1, 1)


def test_weights_that_are_computed_are_left_alone() -> None:
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 4, 5))
    model = nn.Sequential(normed, nn.Flatten(), nn.Linear(64, 3))
    assert SeparableKernelConv().applies_to(model, _task(model, torch.randn(2, 1, 8, 8))) == []


def test_shared_convolutions_stay_shared() -> None:
    conv = nn.Conv2d(2, 2, 3, padding=1)
    made = apply_edits(nn.Sequential(conv, nn.ReLU(), conv), [SeparateKernels(ranks={"0": 1})])
    assert made[0] is made[2]  # type: ignore[index]
    assert math.isclose(params(made), 2 * 2 * 6 + 2)


def test_bad_input() -> None:
    with pytest.raises(BadInput, match="rank"):
        SeparableKernelConv2d(1, 1, 3, rank=4)
    with pytest.raises(BadInput, match="execution"):
        SeparableKernelConv(execution="chained")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="execution"):
        SeparableKernelConv2d(1, 1, 3, execution="chained")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="padding_mode"):
        SeparableKernelConv2d(1, 1, 3, padding_mode="zero")
    with pytest.raises(BadInput, match="same"):
        SeparableKernelConv2d(1, 1, 3, padding="same", stride=2)
    with pytest.raises(BadInput, match="kernel_size"):
        SeparableKernelConv2d(1, 1, (3,))
    with pytest.raises(BadInput, match="x must be"):
        SeparableKernelConv1d(2, 1, 3)(torch.zeros(1, 3, 5))
    with pytest.raises(BadInput, match="one group"):
        from_dense(nn.Conv2d(2, 2, 3, groups=2))
    with pytest.raises(BadInput, match="rank"):
        cp_factors(torch.zeros(1, 3, 3), 4)
    with pytest.raises(BadInput, match="rank"):
        convert(nn.Sequential(nn.Conv2d(1, 1, 3)), 0)
    with pytest.raises(BadInput, match="module '1'"):
        apply_edits(nn.Sequential(nn.Conv2d(1, 1, 3)), [SeparateKernels(ranks={"1": 1})])
