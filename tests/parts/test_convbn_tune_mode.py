"""Tune mode: the numbers of two passes out of one, what it saves, and the way back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torchgraft.bench.models import ResidualNet
from torchgraft.engines.normalize.tune import kept_bytes
from torchgraft.engines.parametrize import fold
from torchgraft.errors import BadInput
from torchgraft.parts.norms.convbn_tune_mode import (
    ConvBN,
    deploy,
    mode_report,
    tune_mode,
    tuned_parameters,
)

PAIRS: dict[str, tuple[nn.Module, nn.Module, tuple[int, ...]]] = {
    "conv1d": (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (3, 4, 9)),
    "strided": (nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6), (3, 4, 9, 9)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (3, 4, 9, 9)),
    "reflected": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6), (3, 4, 9, 9)),
    "conv3d": (nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6), (2, 4, 5, 5, 5)),
    "transposed": (
        nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, output_padding=1),
        nn.BatchNorm2d(6),
        (3, 4, 5, 5),
    ),
    "transposed1d": (nn.ConvTranspose1d(4, 6, 3), nn.BatchNorm1d(6), (3, 4, 5)),
    "linear": (nn.Linear(4, 6), nn.BatchNorm1d(6), (5, 4)),
    "no affine": (nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, affine=False, eps=0.1), (3, 4, 5, 5)),
}


def _settled(model: nn.Module, dtype: torch.dtype = torch.float64) -> Any:
    """Give every batch norm statistics and an affine part that are not the identity."""
    draw = torch.Generator().manual_seed(1)
    module: Any
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.copy_(torch.rand(module.running_mean.shape, generator=draw) - 0.5)
            module.get_buffer("running_var").copy_(torch.rand(module.running_mean.shape, generator=draw) + 0.5)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5, generator=draw)
                nn.init.uniform_(module.bias, -0.5, 0.5, generator=draw)
    return model.to(dtype).eval()


def _everything(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    out = model(x)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out)
    named = {"x": x, **dict(model.named_parameters())}
    grads = torch.autograd.grad((out * weight).sum(), list(named.values()))
    return {"out": out.detach(), **dict(zip(named, grads, strict=True))}


def _same(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float) -> None:
    assert left.keys() == right.keys()
    for name in left:
        gap = (left[name] - right[name]).norm() / right[name].norm().clamp(min=1e-12)
        assert gap < tolerance, f"{name}: {gap}"


@pytest.mark.parametrize("case", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_pass_equals_two_in_output_and_all_gradients(case: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, norm, shape = PAIRS[case]
    model = _settled(copy.deepcopy(nn.Sequential(layer, norm, nn.Tanh())), dtype)
    x = torch.randn(*shape, dtype=dtype)
    expected = _everything(model, x)
    assert not torch.allclose(expected["out"], model[2](model[0](x)), atol=1e-2), "the norm must do something"
    with tune_mode(model, x) as tuned:
        assert torch.equal(tuned.get_submodule("1")(x), x), "nothing is left to the norm"
        _same(_everything(tuned, x), expected, 1e-5 if dtype == torch.float32 else 1e-10)
    assert [type(module) for module in model] == [type(layer), type(norm), nn.Tanh]
    assert torch.equal(model(x).detach(), expected["out"])


@settings(max_examples=25, deadline=None)
@given(
    channels=st.integers(1, 5),
    out=st.integers(1, 5),
    kernel=st.sampled_from([1, 3, 5]),
    stride=st.integers(1, 2),
    dims=st.integers(0, 2),
)
def test_the_block_equals_its_two_pass_form(channels: int, out: int, kernel: int, stride: int, dims: int) -> None:
    options: dict[str, Any] = {"out_channels": out, "kernel_size": kernel, "stride": stride, "dims": dims}
    tune = _settled(ConvBN(channels, **options))
    plain = ConvBN(channels, **options, mode="eval").double().eval()
    plain.load_state_dict(tune.state_dict())
    x = torch.randn(2, channels, *[6] * dims, dtype=torch.float64)
    _same(_everything(tune, x), _everything(plain, x), 1e-10)


def test_the_weights_gradient_is_s_times_that_of_the_fused_weight() -> None:
    torch.manual_seed(0)
    model = _settled(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)))
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    fused = deploy(copy.deepcopy(model))
    tune_mode(model)
    norm: Any = model[1]
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    grad, fused_grad = _everything(model, x)["0.weight"], _everything(fused, x)["0.weight"]
    torch.testing.assert_close(grad, scale.detach()[:, None, None, None] * fused_grad, rtol=1e-10, atol=1e-12)
    assert (grad - fused_grad).norm() > 0.1 * grad.norm()


@pytest.mark.parametrize("case", ["strided", "transposed", "linear", "no affine"])
def test_second_derivatives_are_right(case: str) -> None:
    layer, norm, _ = PAIRS[case]
    model = _settled(nn.Sequential(copy.deepcopy(layer), copy.deepcopy(norm)))
    names = [name for name, _ in model.named_parameters()]

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        def made(x: Tensor) -> Tensor:
            del x
            weight, bias = tuned_parameters(model[0], model[1])
            return (weight.sin().sum() + (bias**3).sum()).reshape(1)

        class Made(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = model

            def forward(self) -> Tensor:
                return made(torch.zeros(()))

        given = {f"inner.{name}": value for name, value in zip(names, values, strict=True)}
        found: Tensor = torch.func.functional_call(Made(), given, ())
        return (found,)

    start = tuple(value.detach().clone().requires_grad_() for value in model.parameters())
    assert torch.autograd.gradcheck(function, start)
    assert torch.autograd.gradgradcheck(function, start)


def test_parameters_by_hand() -> None:
    layer, norm = nn.Linear(1, 1), nn.BatchNorm1d(1, eps=0.0)
    layer.weight.data, layer.bias.data = torch.tensor([[3.0]]), torch.tensor([1.0])
    norm.running_mean, norm.running_var = torch.tensor([5.0]), torch.tensor([4.0])
    norm.weight.data, norm.bias.data = torch.tensor([6.0]), torch.tensor([7.0])
    weight, bias = tuned_parameters(layer, norm)
    assert (weight.item(), bias.item()) == (9.0, -5.0)  # 6/2 * 3 and 6/2 * (1 - 5) + 7


def test_a_convolutions_output_less_is_kept_for_every_block() -> None:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(3)]
    model = nn.Sequential(*blocks).eval()
    x = torch.randn(4, 8, 10, 10)
    before = kept_bytes(model, x)
    report = mode_report(model, x)
    assert report.eval_bytes == before
    tune_mode(model)
    small = sum(4 * p.numel() for p in model.parameters()) * 3  # scaled weights, scales, shifts
    assert kept_bytes(model, x) == report.tune_bytes <= before - 3 * x.nbytes + small
    assert "kept for backward" in str(report)


def test_a_norm_in_training_mode_works_as_it_did() -> None:
    torch.manual_seed(0)
    plain = _settled(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)))
    model = copy.deepcopy(plain)
    tune_mode(model)
    x = torch.randn(4, 2, 6, 6, dtype=torch.float64)
    assert torch.equal(model.train()(x), plain.train()(x))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), plain.buffers(), strict=True))
    torch.testing.assert_close(model.eval()(x), plain.eval()(x), rtol=0, atol=1e-12)


def test_held_norms_stay_in_eval_mode() -> None:
    model = _settled(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Dropout()))
    with tune_mode(model, hold=True):
        model.train()
        assert [module.training for module in model] == [True, False, True]
    assert model.train()[1].training


def test_names_parameters_and_copies_survive() -> None:
    torch.manual_seed(0)
    model = _settled(ResidualNet(widths=(4, 8), depth=1))
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    before, kept, names = model(x).detach(), dict(model.named_parameters()), set(model.state_dict())
    assert len(tune_mode(model, x).pairs) == 6
    assert set(model.state_dict()) == names
    assert all(value is kept[name] for name, value in model.named_parameters())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for value in model.parameters():
            value.zero_()
    torch.testing.assert_close(twin(x).detach(), before, rtol=0, atol=1e-12)
    exported = torch.export.export(twin, (x,), strict=False).module()
    torch.testing.assert_close(exported(x).detach(), before, rtol=0, atol=1e-12)
    assert not [m for m in deploy(twin).modules() if isinstance(m, nn.BatchNorm2d)]
    torch.testing.assert_close(twin(x).detach(), before, rtol=0, atol=1e-12)


def test_fold_leaves_a_tuned_models_function() -> None:
    torch.manual_seed(0)
    model = _settled(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)))
    x = torch.randn(2, 2, 5, 5, dtype=torch.float64)
    before = model(x).detach()
    tune_mode(model)
    torch.testing.assert_close(fold(model, x)(x).detach(), before, rtol=0, atol=1e-12)


def test_what_has_another_reader_is_left_alone() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            z: Tensor = y + self.norm(y)
            return z

    with pytest.raises(BadInput, match="no layer whose only reader"):
        tune_mode(Twice().eval(), torch.randn(1, 2, 3, 3))
    with pytest.raises(BadInput, match=r"1 batch norms are in training mode, call \.eval\(\)"):
        tune_mode(nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)))
    with pytest.raises(BadInput, match="give example="):
        tune_mode(Twice().eval())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 0}, "channels must be at least 1, got 0"),
        ({"channels": 2, "out_channels": -1}, "out_channels must be at least 1, got -1"),
        ({"channels": 2, "kernel_size": 2}, "odd"),
        ({"channels": 2, "dims": 4}, "dims must be 0 to 3"),
        ({"channels": 2, "mode": "train"}, "'train'"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        ConvBN(**options)


def test_bad_inputs() -> None:
    with pytest.raises(BadInput, match=r"\(B, 2, h, w\), got \(2, 5, 5\)"):
        ConvBN(2)(torch.randn(2, 5, 5))
    with pytest.raises(BadInput, match=r"floating point, got torch\.int64"):
        ConvBN(2)(torch.ones(1, 2, 5, 5, dtype=torch.long))


def test_half_precision_scales_in_single() -> None:
    model = _settled(ConvBN(3, out_channels=4), torch.bfloat16)
    weight, bias = tuned_parameters(model.layer, model.norm)
    assert (weight.dtype, bias.dtype) == (torch.bfloat16, torch.bfloat16)
    exact = tuned_parameters(copy.deepcopy(model.layer).double(), copy.deepcopy(model.norm).double())[0]
    assert ((weight - exact).abs() <= exact.abs() * 2**-8).all()
