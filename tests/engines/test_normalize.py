"""The normalisation engine: moments and formula in float64 and by hand, and every fused form beside the plain one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torchgraft.engines import normalize as engine
from torchgraft.engines.normalize import RunningNorm, insertion, statistics
from torchgraft.engines.normalize.mixed import by_moments
from torchgraft.errors import BadInput

DOUBLE = torch.float64


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).mul_(2).add_(1).to(dtype)


def same(left: Tensor, right: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


def same_with_gradients(left: Tensor, right: Tensor, *leaves: Tensor, tolerance: float = 1e-10) -> None:
    same(left, right, tolerance)
    weight = draw(*left.shape, seed=9)
    found, expected = (torch.autograd.grad((y * weight).sum(), leaves, retain_graph=True) for y in (left, right))
    for one, other in zip(found, expected, strict=True):
        same(one, other, tolerance)


def test_moments_by_hand() -> None:
    mean, var = engine.moments(torch.tensor([[1.0, 3.0], [5.0, 9.0]], dtype=DOUBLE), (1,))
    assert mean.tolist() == [[2.0], [7.0]]
    assert var.tolist() == [[1.0], [4.0]]
    assert engine.mean_square(torch.tensor([[3.0, 4.0]]), (1,)).tolist() == [[12.5]]


def test_moments_of_a_mask_are_those_of_what_is_left() -> None:
    x, mask = draw(3, 7, 4), torch.ones(3, 7, 1, dtype=torch.bool)
    mask[0, 5:], mask[2, 1:] = False, False
    rows = x[mask[..., 0]]
    mean, var = engine.moments(x, (0, 1), mask=mask)
    same(mean.flatten(), rows.mean(0))
    same(var.flatten(), rows.var(0, correction=0))
    same(engine.mean_square(x, (0, 1), mask=mask).flatten(), rows.square().mean(0))
    poisoned = torch.where(mask, x, float("nan"))
    same(engine.moments(poisoned, (0, 1), mask=mask)[1], var)


def test_moments_of_nothing_are_zero() -> None:
    for x, mask in ((torch.zeros(0, 3), None), (draw(2, 3), torch.zeros(2, 3, dtype=torch.bool))):
        mean, var = engine.moments(x, (0,), mask=mask)
        assert not mean.any()
        assert not var.any()
        assert not engine.mean_square(x, (0,), mask=mask).any()


def test_half_precision_is_summed_in_single() -> None:
    x = (draw(4096, dtype=torch.float32) + 300).bfloat16()
    mean, var = engine.moments(x, (0,))
    assert mean.dtype == torch.float32
    same(var.double(), x.double().var(0, correction=0, keepdim=True), 1e-4)


def test_pooled_moments_are_those_of_the_union() -> None:
    x = draw(5, 6, 7)
    mean, var = engine.moments(x, (2,))
    for axes in ((0,), (1,), (0, 1)):
        whole = engine.moments(x, (*axes, 2))
        for found, expected in zip(engine.pool(mean, var, axes), whole, strict=True):
            same(found, expected)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 3), st.integers(1, 5), st.integers(1, 40), st.integers(0, 99))
def test_instance_moments_are_moments(batch: int, channels: int, size: int, seed: int) -> None:
    x = draw(batch, channels, size, seed=seed).requires_grad_()
    found, expected = statistics.instance_moments(x), engine.moments(x, (2,))
    for one, other in zip(found, expected, strict=True):
        same_with_gradients(one, other[..., 0], x)


def test_instance_moments_can_be_differentiated_twice_and_keep_digits() -> None:
    x = draw(2, 3, 5).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda value: statistics.instance_moments(value)[1].sqrt().sum(), (x,))
    far = draw(2, 3, 500, dtype=torch.float32) + 1000
    same(statistics.instance_moments(far)[1].double(), far.double().var(2, correction=0), 1e-4)
    constant = statistics.instance_moments(torch.full((1, 1, 9), 3.0))
    assert [value.item() for value in constant] == [3.0, 0.0]


def test_groups_are_split_and_merged() -> None:
    x = draw(2, 6, 5)
    groups = engine.split_groups(x, 3)
    assert torch.equal(groups[:, 1, 0], x[:, 2])
    assert torch.equal(engine.merge_groups(groups), x)
    with pytest.raises(BadInput, match="6 channels, got 4"):
        engine.split_groups(x, 4)


def test_token_norm_is_the_formula() -> None:
    x, weight, bias = (value.requires_grad_() for value in (draw(3, 4, 8), draw(8, seed=1), draw(8, seed=2)))
    found = engine.token_norm(x, (8,), weight=weight, bias=bias)
    plain = engine.normalize(x, *engine.moments(x, (2,)), weight=weight, bias=bias)
    same_with_gradients(found, plain, x, weight, bias)


@pytest.mark.parametrize("affine", [False, True])
def test_root_mean_square_norm_is_the_formula(affine: bool) -> None:
    x, weight = draw(3, 4, 8).requires_grad_(), draw(8, seed=1).requires_grad_()
    used, leaves = (weight, (x, weight)) if affine else (None, (x,))
    found = engine.token_norm(x, (8,), weight=used, centred=False)
    plain = engine.normalize(x, None, engine.mean_square(x, (2,)), weight=used)
    same_with_gradients(found, plain, *leaves)
    same(found, nn.functional.rms_norm(x, (8,), used, eps=1e-5))
    assert torch.autograd.gradgradcheck(lambda value: engine.token_norm(value, (8,), weight=used, centred=False), (x,))
    half = engine.token_norm(x.detach().bfloat16(), (8,), centred=False)
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_group_norm_is_the_formula(groups: int) -> None:
    x, weight, bias = (value.requires_grad_() for value in (draw(3, 6, 4, 5), draw(6, seed=1), draw(6, seed=2)))
    found = engine.group_norm(x, groups, weight=weight, bias=bias)
    parts = engine.split_groups(x, groups)
    plain = engine.merge_groups(engine.normalize(parts, *engine.moments(parts, (2, 3, 4))))
    same_with_gradients(found, engine.affine(plain, weight, bias, layout="first"), x, weight, bias)
    if groups == 6:
        same(found, nn.functional.instance_norm(x, weight=weight, bias=bias))


def test_groups_of_nothing_and_of_one_value() -> None:
    assert engine.group_norm(torch.zeros(0, 4, 3), 2).shape == (0, 4, 3)
    bias = draw(4)
    same(engine.group_norm(draw(2, 4), 4, bias=bias), bias.expand(2, 4))


@pytest.mark.parametrize("layout", ["first", "last"])
def test_batch_norm_is_the_formula(layout: engine.norm.Layout) -> None:
    shape, axes = ((3, 4, 5), (0, 1)) if layout == "last" else ((3, 5, 4), (0, 2))
    x, weight, bias = (value.requires_grad_() for value in (draw(*shape), draw(5, seed=1), draw(5, seed=2)))
    found = engine.batch_norm(x, None, None, weight=weight, bias=bias, training=True, layout=layout)
    plain = engine.normalize(x, *engine.moments(x, axes), weight=weight, bias=bias, layout=layout)
    same_with_gradients(found, plain, x, weight, bias)


def test_batch_norm_of_nothing_and_of_one_value() -> None:
    assert engine.batch_norm(torch.zeros(0, 4), None, None, training=True).shape == (0, 4)
    with pytest.raises(BadInput, match=r"more than one value a channel, got an input of \(1, 4\)"):
        engine.batch_norm(draw(1, 4), None, None, training=True)


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_running_norm_is_torchs_batch_norm(momentum: float | None) -> None:
    ours = RunningNorm(3, momentum=momentum, layout="first").double()
    theirs = nn.BatchNorm1d(3, momentum=momentum).double()
    theirs.load_state_dict(ours.state_dict())
    for seed in range(3):
        x = draw(4, 3, 5, seed=seed)
        same(ours.standardized(x), theirs(x))
    for name, buffer in theirs.named_buffers():
        same(ours.get_buffer(name).double(), buffer.double())
    assert int(ours.num_batches_tracked) == 3
    same(ours.eval().standardized(x), theirs.eval()(x))


def test_running_norm_tracks_by_hand() -> None:
    norm = RunningNorm(1, momentum=0.25, statistics=("var",)).double()
    norm.track(var=torch.tensor([5.0], dtype=DOUBLE))
    norm.track(var=torch.tensor([3.0], dtype=DOUBLE))
    assert norm.running_var.item() == 0.75 * (0.75 + 0.25 * 5) + 0.25 * 3
    assert not hasattr(norm, "running_mean")
    average = RunningNorm(1, momentum=None).double()
    for value in (2.0, 4.0, 9.0):
        average.track(mean=torch.tensor([value], dtype=DOUBLE))
    assert average.running_mean.item() == pytest.approx(5.0)


def test_padding_does_not_reach_the_running_statistics() -> None:
    norm, packed = (RunningNorm(4, momentum=0.5).double() for _ in range(2))
    x, mask = draw(2, 5, 4), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    found = norm.standardized(torch.where(mask[..., None], x, 1e6), mask=mask)
    same(found[mask], packed.standardized(x[mask]))
    same(norm.running_mean, packed.running_mean)
    same(norm.running_var, packed.running_var)
    same(norm.eval().standardized(x, mask=mask), norm.standardized(x))
    with pytest.raises(BadInput, match="without its channels"):
        norm.standardized(x, mask=mask[:1])
    with pytest.raises(BadInput, match="the mask leaves 1"):
        norm.train().standardized(x, mask=torch.zeros_like(mask).index_fill(1, torch.tensor([0]), True) & mask.new_tensor([[1], [0]]))  # fmt: skip  # noqa: E501


def group_recipe(mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    mean, var = engine.pool(mean.unflatten(1, (2, -1)), var.unflatten(1, (2, -1)), (2,))
    centre, spread = (value.expand(-1, -1, 3).flatten(1) for value in (mean, var))
    scale = weight * torch.rsqrt(spread + 1e-5)
    return scale, bias - centre * scale


RECIPES = {
    "group norm": group_recipe,
    "scale alone": lambda mean, var, weight, bias: (weight * var, bias),
    "shift alone": lambda mean, var, weight, bias: (weight[None], bias * mean),
    "no statistics": lambda mean, var, weight, bias: (weight[None], bias[None]),
}


@pytest.mark.parametrize("name", RECIPES)
def test_norms_by_moments_are_the_formula(name: str) -> None:
    recipe = RECIPES[name]
    x, weight, bias = (value.requires_grad_() for value in (draw(3, 6, 4, 5), draw(6, seed=1), draw(6, seed=2)))
    y, mean, var = by_moments(x, recipe, weight, bias)
    exact = engine.moments(x, (2, 3))
    scale, shift = (
        value.expand(3, 6)[..., None, None]
        for value in recipe(*(value[..., 0, 0] for value in exact), weight, bias)  # type: ignore[no-untyped-call]
    )
    same_with_gradients(y, scale * x + shift, x, weight, bias)
    same(mean, exact[0][..., 0, 0].detach())
    same(var, exact[1][..., 0, 0].detach())
    if name == "group norm":
        same(y, engine.group_norm(x, 2, weight=weight, bias=bias))
    small = [value.detach()[:2].requires_grad_() if value is x else value for value in (x, weight, bias)]
    assert torch.autograd.gradgradcheck(lambda *given: by_moments(given[0], recipe, *given[1:])[0].square(), small)


def test_norms_by_moments_take_other_memory_and_dtypes() -> None:
    x, weight, bias = draw(3, 6, 4, 5), draw(6, seed=1), draw(6, seed=2)
    y = by_moments(x, group_recipe, weight, bias)[0]
    same(by_moments(x.contiguous(memory_format=torch.channels_last), group_recipe, weight, bias)[0], y)
    half = by_moments(x.bfloat16(), group_recipe, weight.float(), bias.float())[0]
    assert half.dtype == torch.bfloat16
    same(half.double(), y, 0.05)
    assert by_moments(x[:0], group_recipe, weight, bias)[0].shape == (0, 6, 4, 5)
    frozen = by_moments(x.requires_grad_(), group_recipe, weight, bias)[0]
    assert torch.autograd.grad(frozen.sum(), x)[0].shape == x.shape


def test_moments_in_blocks_are_moments() -> None:
    for rows, size in ((5, 40_000), (700, 100), (1, 1)):
        x = draw(rows, size)
        mean, var = statistics.row_moments(x)
        same(mean, x.mean(1))
        same(var, x.var(1, correction=0))


def test_neighbours_stand_in_sequences() -> None:
    inner = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Softmax(1))
    model = nn.ModuleList([inner, nn.Linear(2, 2), nn.ReLU()])
    found = list(insertion.neighbours(model, insertion.LAYERS, insertion.ACTIVATIONS))
    assert [(name, one, other) for _, name, one, other in found] == [("0", "0", "1")]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RunningNorm(0), "at least one channel, got 0"),
        (lambda: RunningNorm(2, eps=0.0), "eps of a batch norm must be positive, got 0.0"),
        (lambda: RunningNorm(2, momentum=0.0), r"momentum must lie in \(0, 1\] or be None, got 0.0"),
        (lambda: RunningNorm(2).checked(torch.zeros(3, 4)), r"the last of size 2, got \(3, 4\)"),
        (lambda: RunningNorm(2, layout="first").checked(torch.zeros(2)), r"the second of size 2, got \(2,\)"),
        (lambda: RunningNorm(2).checked(torch.zeros(3, 2, dtype=torch.long)), "floating-point input, got torch.int64"),
    ],
)
def test_bad_input_is_refused(call: object, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        call()  # type: ignore[operator]
