"""Norms go into the layers that read them, exactly, and only where nothing else reads them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft import fold
from torchgraft.bench.models import ByteTransformer, VisionTransformer
from torchgraft.engines.normalize.fold import channel_affine, fold_affine, following, plan_folds
from torchgraft.errors import BadInput

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}


def _settled(model: nn.Module, dtype: torch.dtype = torch.float64) -> Any:
    """Give every norm statistics and an affine part that are not the identity."""
    draw = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.copy_(torch.rand(module.running_mean.shape, generator=draw) - 0.5)
            module.running_var.copy_(torch.rand(module.running_mean.shape, generator=draw) + 0.5)  # type: ignore[union-attr]
        if "Norm" in type(module).__name__:
            with torch.no_grad():
                for value in module.parameters(recurse=False):
                    value.add_(0.3 * torch.randn(value.shape, generator=draw))
    return model.to(dtype).eval()


def _norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def _kept(model: nn.Module, x: Tensor, example: Tensor | None, **options: Any) -> tuple[nn.Module, Tensor, Tensor]:
    with torch.no_grad():
        before = model(x)
        folded = fold(copy.deepcopy(model), example, **options)
        return folded, before, folded(x)


PAIRS: dict[str, tuple[nn.Module, nn.Module, tuple[int, ...], bool]] = {
    "1x1": (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1), (3, 4, 5, 5), True),
    "unpadded": (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, stride=2, bias=False), (3, 4, 7, 7), True),
    "grouped": (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2), (3, 4, 7, 7), True),
    "depthwise": (nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, groups=4), (3, 4, 7, 7), True),
    "reflected": (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (3, 4, 7, 7), True),
    "valid": (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding="valid"), (3, 4, 7, 7), True),
    "conv3d": (nn.BatchNorm3d(4), nn.Conv3d(4, 6, 2), (2, 4, 4, 4, 4), True),
    "no affine": (nn.BatchNorm2d(4, affine=False, eps=0.1), nn.Conv2d(4, 6, 1), (3, 4, 5, 5), True),
    "padded": (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1), (3, 4, 7, 7), False),
    "same": (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding="same"), (3, 4, 7, 7), False),
    "transposed": (nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 3), (3, 4, 5, 5), False),
    "nonlinearity": (nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), nn.Conv2d(4, 6, 1), (3, 4, 5, 5), False),
    "batch statistics": (nn.BatchNorm2d(4, track_running_stats=False), nn.Conv2d(4, 6, 1), (3, 4, 5, 5), False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("case", PAIRS)
def test_a_batch_norm_goes_into_the_convolution_behind_it(case: str, traced: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm, layer, shape, can = PAIRS[case]
    model = _settled(copy.deepcopy(nn.Sequential(norm, layer)), dtype)
    x = torch.randn(*shape, dtype=dtype)
    folded, before, after = _kept(model, x, x if traced else None)
    assert bool(_norms(folded)) != can
    torch.testing.assert_close(after, before, rtol=0, atol=TOLERANCE[dtype])
    if can:
        assert not torch.allclose(before, model[1](x), atol=1e-2), "the norm must do something"


@pytest.mark.parametrize(("shape", "can"), [((5, 4), True), ((5, 4, 4), False)])
def test_before_a_linear_layer_the_axes_decide(shape: tuple[int, ...], can: bool) -> None:
    torch.manual_seed(0)
    model = _settled(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)))
    x = torch.randn(*shape, dtype=torch.float64)
    folded, before, after = _kept(model, x, x)
    assert bool(_norms(folded)) != can
    torch.testing.assert_close(after, before, rtol=0, atol=1e-12)
    assert _norms(_kept(model, x, None)[0]), "without a trace the axes are not known"


def test_an_unbatched_convolutions_positions_are_no_channels() -> None:
    model = _settled(nn.Sequential(nn.BatchNorm1d(4), nn.Conv1d(4, 3, 1)))
    for x in (torch.randn(4, 4).double(), torch.randn(2, 4, 5).double()):
        for example in (x, None):
            _, before, after = _kept(model, x, example)
            torch.testing.assert_close(after, before, rtol=0, atol=1e-12)
    assert not _norms(_kept(model, x, x)[0])


class _Readers(nn.Module):
    """Norms whose output is read by linear layers only (a), also by an addition (b), twice by one layer (c)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.q, self.k = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.b, self.fb = nn.LayerNorm(4), nn.Linear(4, 4)
        self.c, self.fc = nn.RMSNorm(4), nn.Linear(4, 4)
        self.d, self.drop, self.fd = nn.LayerNorm(4), nn.Dropout(0.3), nn.Linear(4, 4)
        self.e, self.fe = nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.last = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        x = x + self.q(h) * self.k(h)
        h = self.b(x)
        x = h + self.fb(h)
        h = self.c(x)
        x = x + self.fc(h) + self.fc(h * h)
        x = x + self.fd(self.drop(self.d(x)))
        x = x + self.fe(self.e(x)).tanh()
        y: Tensor = self.last(x)
        return y


def test_only_norms_without_another_reader_are_folded() -> None:
    torch.manual_seed(0)
    model = _settled(_Readers())
    x = torch.randn(6, 4, dtype=torch.float64)
    assert {name: sorted(each for each, _ in readers) for name, readers in following(model, x).items()} == {
        "a": ["k", "q"],
        "d": ["fd"],
        "e": ["fe"],
    }
    folded: Any
    folded, before, after = _kept(model, x, x)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-12)
    assert [getattr(folded, name).weight is None for name in "abcd"] == [True, False, False, True]
    assert isinstance(folded.e, nn.Identity)
    assert folded.k.bias is not None, "a shift needs a bias"
    assert folded.last.weight is not None
    plain: Any = _kept(model, x, x, affine=False)[0]
    assert plain.a.weight is not None
    assert isinstance(plain.e, nn.Identity)
    untouched: Any = _kept(model, x, None)[0]
    assert untouched.a.weight is not None
    assert not isinstance(untouched.e, nn.Identity)


def test_in_training_mode_nothing_is_folded() -> None:
    model = _settled(_Readers()).train()
    fold(model, torch.randn(6, 4, dtype=torch.float64))
    assert model.a.weight is not None
    assert isinstance(model.e, nn.BatchNorm1d)


def test_hooked_shared_and_tied_modules_stay() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 4, dtype=torch.float64)
    hooked = _settled(_Readers())
    hooked.q.register_forward_hook(lambda *_: None)
    tied = _settled(_Readers())
    tied.fd.weight = tied.fb.weight
    shared = _settled(_Readers())
    shared.e = nn.Identity()
    shared.last = shared.a
    for model, names in ((hooked, ("a",)), (tied, ("d",)), (shared, ("a",))):
        before = model(x).detach()
        fold(model, x)
        assert all(getattr(model, name).weight is not None for name in names)
        torch.testing.assert_close(model(x).detach(), before, rtol=0, atol=1e-12)


def _torch_stack() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@pytest.mark.parametrize(
    ("build", "x", "count"),
    [
        (lambda: VisionTransformer(d_model=16, depth=2, num_heads=2), torch.randn(2, 1, 8, 8).double(), 4),
        (lambda: ByteTransformer(20, 8, d_model=16, depth=2, num_heads=2), torch.randint(20, (2, 8)), 5),
        (_torch_stack, torch.randn(2, 5, 16).double(), 2),
    ],
    ids=["vit", "bytes", "torch"],
)
def test_transformers_lose_their_gains(build: Callable[[], nn.Module], x: Tensor, count: int) -> None:
    torch.manual_seed(0)
    model = _settled(build())
    folded, before, after = _kept(model, x, x)
    bare = [m for m in folded.modules() if isinstance(m, nn.LayerNorm) and m.weight is None]
    assert len(bare) >= count
    torch.testing.assert_close(after, before, rtol=0, atol=1e-11)
    torch.testing.assert_close(folded(x).detach(), before, rtol=0, atol=1e-11)  # with gradients, off the fused path


class _Between(nn.Module):
    """A norm, something that happens to its output, and a linear layer."""

    def __init__(self, act: Callable[[Tensor], Tensor], inputs: int = 4) -> None:
        super().__init__()
        self.norm, self.fc, self.act = nn.LayerNorm(4), nn.Linear(inputs, 3), act

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.act(self.norm(x)))
        return y


KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "first token": lambda x: x[:, 0],
    "tokens": lambda x: x[:, 1:3],
    "chosen tokens": lambda x: x[:, torch.tensor([2, 0])],
    "one token each": lambda x: x[torch.arange(2), torch.tensor([1, 3])],
    "mean of tokens": lambda x: x.mean(1),
    "flat": lambda x: x.reshape(-1, 4),
    "heads of all channels": lambda x: x.view(2, 1, 4, 4),
    "axes in front": lambda x: x.transpose(0, 1)[None].permute(2, 1, 0, 3),
}
LOST: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "other axes": (lambda x: x.transpose(1, 2), 4),
    "turned": (lambda x: x.permute(0, 2, 1), 4),
    "two channels": (lambda x: x[..., 1:3], 2),
    "all tokens in one": (lambda x: x.flatten(1), 16),
    "other order": (lambda x: x[..., torch.tensor([3, 2, 1, 0])], 4),
    "picked in other order": (lambda x: x.index_select(-1, torch.tensor([1, 0, 3, 2])), 4),
    "mean of channels": (lambda x: x.mean(-1), 4),
    "sum of tokens": (lambda x: x.sum(1), 4),
    "doubled": (lambda x: 2 * x, 4),
    "activated": (torch.relu, 4),
    "pushed": (lambda x: F.pad(x, (1, -1), mode="reflect"), 4),
    "precise": (lambda x: x.float().double(), 4),
}


@pytest.mark.parametrize("case", [*KEPT, *LOST])
def test_channels_are_followed_through_what_moves_tokens_only(case: str) -> None:
    torch.manual_seed(0)
    act, inputs = (KEPT[case], 4) if case in KEPT else LOST[case]
    model = _settled(_Between(act, inputs))
    x = torch.randn(2, 4, 4, dtype=torch.float64)
    folded, before, after = _kept(model, x, x)
    assert (folded.norm.weight is None) == (case in KEPT)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-12)


class _Peeks(nn.Module):
    """Layers whose weight or bias is used outside of them, and a norm whose gain is."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.fa, self.b, self.fb = nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)
        self.c, self.fc, self.d, self.fd = nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x) * self.fa.weight[0]
        y = y + self.fb(self.b(x)) + self.fb.bias
        y = y + F.linear(self.c(x), self.fc.weight)
        return y + self.fd(self.d(x)) * self.d.weight


def test_weights_that_are_used_elsewhere_stay() -> None:
    torch.manual_seed(0)
    model, x = _settled(_Peeks()), torch.randn(4, 4, dtype=torch.float64)
    folded, before, after = _kept(model, x, x)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-12)
    reasons = {each.name: each.reason for each in plan_folds(model, x)}
    assert not any(each.readers for each in plan_folds(model, x))
    assert "select" in reasons["a"] or "mul" in reasons["a"]
    assert reasons["d"] == "its parameters are read by another module"
    assert all(getattr(folded, name).weight is not None for name in "abcd")


def test_every_norm_is_accounted_for(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, x = _settled(_Readers()), torch.randn(6, 4, dtype=torch.float64)
    model.fd.register_forward_hook(lambda *_: None)
    plan = {each.name: each for each in plan_folds(model, x)}
    assert plan.keys() == {"a", "b", "c", "d", "e", "last"}
    assert {name: set(each.readers) for name, each in plan.items() if each.readers} == {"a": {"q", "k"}, "e": {"fe"}}
    assert "it is read by add" in plan["b"].reason
    assert __file__ in plan["b"].reason, "the line that reads it is named"
    assert plan["d"].reason == "its reader fd carries hooks"
    assert plan["last"].reason == "the model gives its output"
    assert "were not asked for" in plan_folds(model, x, affine=False)[0].reason
    assert "without an example" in plan_folds(model)[0].reason
    with caplog.at_level("INFO", logger="torchgraft"):
        fold(model, x)
    told = [record.message for record in caplog.records if record.name == "torchgraft"]
    assert told == [str(each) for each in plan.values()]


class _Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x) if float(x.sum()) > 0 else self.body(-x)
        return y


def test_what_cannot_be_traced_is_folded_in_sequences_only() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 4, dtype=torch.float64)
    model = _settled(nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3)), nn.RMSNorm(3)))
    folded: Any
    folded, before, after = _kept(model, x, None)
    assert folded[1][0].weight is None
    torch.testing.assert_close(after, before, rtol=0, atol=1e-12)
    inside = _settled(_Branching())
    before = inside(x)
    torch.testing.assert_close(fold(inside, x)(x), before, rtol=0, atol=1e-12)
    assert inside.body[0].weight is not None, "a forward that is not followed may read the norm itself"


class _Own(nn.Module):
    """A norm of another's make that says what it is in eval mode."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.rand(width) + 0.5), nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift

    def channel_affine(self) -> tuple[Tensor, Tensor]:
        return self.scale, self.shift


class _Halved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x) / 2
        return y

    def folded(self) -> nn.Module:
        with torch.no_grad():
            for value in self.norm.parameters():
                value.div_(2)
        return self.norm


def test_modules_may_say_themselves_how_they_fold() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    model = _settled(nn.Sequential(_Own(4), nn.Linear(4, 4), _Halved(), nn.Linear(4, 4)))
    folded, before, after = _kept(model, x, x)
    assert [type(each) for each in folded] == [nn.Identity, nn.Linear, nn.LayerNorm, nn.Linear]  # type: ignore[attr-defined]
    torch.testing.assert_close(after, before, rtol=0, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(
    groups=st.integers(1, 3),
    inputs=st.integers(1, 3),
    outputs=st.integers(1, 3),
    kernel=st.integers(1, 3),
    biased=st.booleans(),
)
def test_folding_into_a_convolution_by_definition(
    groups: int, inputs: int, outputs: int, kernel: int, biased: bool
) -> None:
    layer = nn.Conv1d(groups * inputs, groups * outputs, kernel, groups=groups, bias=biased).double()
    x = torch.randn(2, groups * inputs, 6).double()
    scale, shift = torch.randn(groups * inputs).double(), torch.randn(groups * inputs).double()
    expected = layer(scale[:, None] * x + shift[:, None])
    torch.testing.assert_close(fold_affine(layer, scale, shift)(x), expected, rtol=1e-12, atol=1e-12)


def test_the_affine_map_of_a_batch_norm_by_hand() -> None:
    norm = nn.BatchNorm1d(1, eps=1.0).eval()
    norm.running_mean, norm.running_var = torch.tensor([2.0]), torch.tensor([3.0])
    norm.weight.data, norm.bias.data = torch.tensor([4.0]), torch.tensor([5.0])
    scale, shift = channel_affine(norm)
    assert (scale.item(), shift.item()) == (2.0, 1.0)  # 4 / sqrt(3 + 1), 5 - 2 * 2
    x = torch.tensor([[7.0]])
    assert F.linear(x, scale.float()[None], shift.float()).item() == norm(x).item()


def test_frozen_layers_stay_frozen_and_dtypes_stay() -> None:
    layer = nn.Linear(2, 3, bias=False).bfloat16()
    layer.weight.requires_grad_(False)
    fold_affine(layer, torch.ones(2), torch.ones(2))
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16
    assert not layer.weight.requires_grad
    assert not layer.bias.requires_grad


def test_what_takes_no_norm_is_refused() -> None:
    with pytest.raises(BadInput, match="of 3 input channels is needed"):
        fold_affine(nn.Linear(2, 2), torch.ones(3), None)
    with pytest.raises(BadInput, match="does not pad with zeros"):
        fold_affine(nn.Conv2d(3, 3, 3, padding=1), torch.ones(3), None)
    with pytest.raises(BadInput, match="in eval mode is needed, got LayerNorm"):
        channel_affine(nn.LayerNorm(2))
