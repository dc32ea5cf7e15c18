"""IBN: its halves are torch's norms, the first ignores appearance, and conversions carry everything over."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.models import ResidualNet
from torchgraft.errors import BadInput, Untraceable
from torchgraft.parts.norms.ibn_net import IBN, residual_stages, to_ibn

DOUBLE = torch.float64


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE) * 2 + 1


def moved(norm: IBN) -> IBN:
    norm.to(DOUBLE)
    with torch.no_grad():
        norm.weight.add_(draw(norm.channels, seed=5) * 0.2)
        norm.bias.add_(draw(norm.channels, seed=6) * 0.2)
    return norm


def halves(norm: IBN) -> tuple[nn.InstanceNorm2d, nn.BatchNorm2d]:
    first = nn.InstanceNorm2d(norm.split, affine=True).to(DOUBLE)
    second = nn.BatchNorm2d(norm.channels - norm.split).to(DOUBLE)
    for part, rows in ((first, slice(0, norm.split)), (second, slice(norm.split, None))):
        part.load_state_dict({"weight": norm.weight[rows], "bias": norm.bias[rows]}, strict=False)
    return first, second


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 9), st.floats(0.5, 0.7), st.integers(0, 99))
def test_halves_are_torchs_norms(channels: int, ratio: float, seed: int) -> None:
    norm = moved(IBN(channels, ratio=ratio))
    assert norm.split == int(ratio * channels)
    first, second = halves(norm)
    for training in (True, True, False):
        for module in (norm, first, second):
            module.train(training)
        x = draw(3, channels, 3, 4, seed=seed).requires_grad_()
        h = norm.split
        outs = norm(x), torch.cat([first(x[:, :h]), second(x[:, h:])], 1)
        torch.testing.assert_close(*outs, rtol=1e-10, atol=1e-10)
        grads = [torch.autograd.grad((out * draw(*x.shape, seed=1)).sum(), x)[0] for out in outs]
        torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(norm.running_mean, second.running_mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(norm.running_var, second.running_var, rtol=0, atol=1e-12)
    assert int(norm.num_batches_tracked) == 2


def test_ends_of_the_ratio_are_batch_norm_and_instance_norm() -> None:
    x = draw(3, 4, 3, 3)
    torch.testing.assert_close(IBN(4, ratio=0.0).to(DOUBLE)(x), F.batch_norm(x, None, None, training=True))
    torch.testing.assert_close(IBN(4, ratio=1.0).to(DOUBLE)(x), F.instance_norm(x))


def test_first_half_ignores_appearance_and_the_second_does_not() -> None:
    norm = moved(IBN(6, eps=1e-12))
    norm.train()(draw(8, 6, 4, 4, seed=3))
    norm.eval()
    x = draw(5, 6, 4, 4)
    gain, offset = draw(5, 6, 1, 1, seed=1).abs() + 0.1, draw(5, 6, 1, 1, seed=2)
    before, after = norm(x), norm(gain * x + offset)
    torch.testing.assert_close(after[:, :3], before[:, :3], rtol=0, atol=1e-8)
    assert (after[:, 3:] - before[:, 3:]).abs().amax((0, 2, 3)).min() > 0.5
    assert (norm(-x)[:, :3] - before[:, :3]).abs().max() > 0.5


def net() -> ResidualNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ResidualNet(widths=(4, 6, 8, 10), depth=2).double()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.data.uniform_(0.5, 1.5)
                module.bias.data.uniform_(-0.5, 0.5)
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.5, 2.0)
    return model.eval()


def test_stages_are_runs_of_equal_width() -> None:
    model = net()
    assert residual_stages(model) == [[f"blocks.{2 * s}", f"blocks.{2 * s + 1}"] for s in range(4)]


def test_variant_a_carries_everything_over() -> None:
    model, x = net(), draw(2, 1, 16, 16)
    original = copy.deepcopy(model)
    report = to_ibn(model)
    assert report.names == tuple(f"blocks.{place}.bn1" for place in range(6))
    assert report.parameters_before == report.parameters_after
    assert not any(module.training for module in model.modules())
    assert model(x).shape == original(x).shape
    for name in report.names:
        old, new = original.get_submodule(name), model.get_submodule(name)
        assert isinstance(new, IBN)
        assert torch.equal(old.weight, new.weight)
        assert torch.equal(old.bias, new.bias)
        assert torch.equal(old.running_var[new.split :], new.running_var)
        z = draw(3, new.channels, 4, 4)
        torch.testing.assert_close(new(z)[:, new.split :], old(z)[:, new.split :], rtol=1e-10, atol=1e-10)
        assert (new(z)[:, : new.split] - old(z)[:, : new.split]).abs().max() > 0.1
    assert isinstance(model.get_submodule("blocks.6.bn1"), nn.BatchNorm2d)


def test_variant_a_without_instance_norm_is_the_model() -> None:
    model, x = net(), draw(2, 1, 16, 16)
    before = model(x)
    to_ibn(model, stages=(0, 3), ratio=0.0)
    torch.testing.assert_close(model(x), before, rtol=1e-10, atol=1e-10)


def test_variant_b_normalises_the_sum_and_the_stem() -> None:
    model, x = net(), draw(2, 4, 8, 8)
    blocks = [copy.deepcopy(model.get_submodule(f"blocks.{place}")) for place in (0, 1)]
    names = set(model.state_dict())
    report = to_ibn(model, "b")
    assert not any(module.training for module in model.modules())
    assert report.names == ("blocks.1.instance_norm", "blocks.3.instance_norm", "bn")
    assert report.parameters_after - report.parameters_before == 2 * (4 + 6)
    block = blocks[1]
    inner = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
    torch.testing.assert_close(
        model.get_submodule("blocks.1")(x), F.relu(F.instance_norm(inner + x)), rtol=0, atol=1e-9
    )
    torch.testing.assert_close(model.get_submodule("blocks.0")(x), blocks[0](x), rtol=0, atol=1e-12)
    stem = model.get_submodule("bn")
    assert isinstance(stem, IBN)
    assert stem.split == 4
    assert names - set(model.state_dict()) == set()
    assert model(draw(2, 1, 16, 16)).isfinite().all()


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn2(self.conv2(x)) if x.sum() > 0 else x


class Chain(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(x))


def test_bad_input_is_refused() -> None:
    with pytest.raises(BadInput, match=r"ratio must lie in \[0, 1\], got 1.5"):
        IBN(4, ratio=1.5)
    with pytest.raises(BadInput, match="at least 4 pixels"):
        IBN(4)(torch.zeros(2, 4, 1, 3))
    with pytest.raises(BadInput, match="variant must be 'a' or 'b', got 'c'"):
        to_ibn(net(), "c")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="4 residual stages"):
        to_ibn(net(), stages=(4,))
    with pytest.raises(BadInput, match="0 residual stages"):
        to_ibn(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(Untraceable, match=r"block '0\.0'"):
        to_ibn(nn.Sequential(nn.Sequential(Branching())), "b", stages=(0,))
    with pytest.raises(BadInput, match="adds nothing"):
        to_ibn(nn.Sequential(Chain()), "b", stages=(0,))
    bare = Chain()
    bare.bn1 = nn.BatchNorm2d(4, track_running_stats=False)
    with pytest.raises(BadInput, match="running statistics"):
        to_ibn(nn.Sequential(bare), stages=(0,))
