"""EvoNorm: the six equations written out, their scale laws, fusing, and the search that finds such layers."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.models import ResidualNet
from torchgraft.contracts import Subject, checks_for
from torchgraft.contracts.norms import CHECKS
from torchgraft.contracts.run import run_check
from torchgraft.engines.normalize import discovery
from torchgraft.engines.normalize.discovery import Discovered, Node, Score
from torchgraft.errors import BadInput, Untraceable
from torchgraft.parts.norms import evonorm
from torchgraft.parts.norms.evonorm import EvoNorm, fuse_norm_act

DOUBLE = torch.float64
VARIANTS = get_args(evonorm.Variant)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE) * 1.5 + 0.5


def moved(norm: EvoNorm) -> EvoNorm:
    norm.to(DOUBLE)
    with torch.no_grad():
        for place, value in enumerate(norm.parameters()):
            value.add_(0.2 * draw(*value.shape, seed=place + 5))
    return norm


def written_out(norm: EvoNorm, x: Tensor, stored: Tensor | None = None) -> Tensor:
    """The paper's table, with axes by name."""
    gamma, beta = norm.weight[:, None, None], norm.bias[:, None, None]
    v1 = None if norm.v1 is None else norm.v1[:, None, None]
    wh = (2, 3)

    def deviation(axes: tuple[int, ...], of: Tensor = x) -> Tensor:
        return (((of - of.mean(axes, keepdim=True)) ** 2).mean(axes, keepdim=True) + norm.eps).sqrt()

    def size(axes: tuple[int, ...], of: Tensor = x) -> Tensor:
        return ((of**2).mean(axes, keepdim=True) + norm.eps).sqrt()

    batch = deviation((0, 2, 3)) if stored is None else (stored + norm.eps).sqrt()[:, None, None]
    parts = x.unflatten(1, (norm.groups, -1)) if norm.variant.startswith("S") else x[:, None]
    spread = (parts.shape[0], x.shape[1], 1, 1)
    by_group, size_group = (
        kind((2, 3, 4), parts).expand(-1, -1, parts.shape[2], 1, 1).reshape(spread) for kind in (deviation, size)
    )
    y = {
        "B0": lambda: x / torch.maximum(batch, v1 * x + deviation(wh)),
        "B1": lambda: x / torch.maximum(batch, (x + 1) * size(wh)),
        "B2": lambda: x / torch.maximum(batch, size(wh) - x),
        "S0": lambda: x * torch.sigmoid(v1 * x) / by_group,
        "S1": lambda: x * torch.sigmoid(x) / by_group,
        "S2": lambda: x * torch.sigmoid(x) / size_group,
    }[norm.variant]()
    return y * gamma + beta


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_its_equation(variant: evonorm.Variant) -> None:
    norm = moved(EvoNorm(6, variant=variant, groups=3))
    stored = None
    for training in (True, False):
        norm.train(training)
        if not training and variant.startswith("B"):
            norm.running_var.copy_(draw(6, seed=3).abs() + 0.1)
            stored = norm.running_var
        x = draw(3, 6, 4, 5).requires_grad_()
        leaves = (x, *norm.parameters())
        outs = norm(x), written_out(norm, x, stored)
        torch.testing.assert_close(*outs, rtol=1e-10, atol=1e-10)
        grads = [torch.autograd.grad((out * draw(*x.shape, seed=9)).sum(), leaves) for out in outs]
        torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_gradients_and_other_devices(variant: evonorm.Variant) -> None:
    norm, x = moved(EvoNorm(2, variant=variant, groups=1)), draw(2, 2, 2, 2).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda value: norm(value).square().sum(), (x,))
    shape = norm.to("meta")(torch.empty(3, 2, 4, 4, device="meta", dtype=DOUBLE)).shape
    assert shape == (3, 2, 4, 4)


@pytest.mark.parametrize("variant", ["B0", "B1", "B2"])
def test_stored_variance_is_that_of_the_batch(variant: evonorm.Variant) -> None:
    norm, x = moved(EvoNorm(4, variant=variant, momentum=0.25)), draw(3, 4, 3, 3)
    training = norm(x)
    torch.testing.assert_close(norm.running_var, 0.75 + 0.25 * x.transpose(0, 1).flatten(1).var(1))
    norm.eval().running_var.copy_(x.transpose(0, 1).flatten(1).var(1, correction=0))
    torch.testing.assert_close(norm(x), training, rtol=0, atol=1e-10)
    torch.testing.assert_close(norm(x)[1:2], norm(x[1:2]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", ["S0", "S1", "S2"])
def test_s_series_keeps_the_contract_of_one_without_batches(variant: str) -> None:
    capabilities = frozenset({"batch-independent", "train-eval-equal", "channels-first"})
    example = {"channels": 6, "variant": variant, "groups": 3}
    card = evonorm.CARD.model_copy(update={"capabilities": capabilities, "example": example})
    subject = Subject(card=card, entry=EvoNorm, module=types.ModuleType("evonorm"))
    names = {check.name for check in CHECKS}
    ran = [run_check(check, subject) for check in checks_for(card) if check.name in names]
    # Built from the width alone it is B0, which has what S1 and S2 lack.
    assert [result.reason for result in ran if not result.good] == []
    assert len(ran) == 7


@settings(max_examples=15, deadline=None)
@given(st.floats(0.01, 50.0), st.integers(0, 99))
def test_scale_laws(c: float, seed: int) -> None:
    x = draw(3, 4, 3, 3, seed=seed)
    b0, s0 = (moved(EvoNorm(4, variant=variant, groups=2, eps=1e-18)) for variant in ("B0", "S0"))
    torch.testing.assert_close(b0(c * x), b0(x), rtol=1e-8, atol=1e-8)
    before = s0(x)
    with torch.no_grad():
        s0.v1.div_(c)
    torch.testing.assert_close(s0(c * x), before, rtol=1e-8, atol=1e-8)


def test_nothing_is_centred() -> None:
    x = draw(3, 4, 3, 3)
    assert (EvoNorm(4, variant="S2", groups=2).to(DOUBLE)(x + 2) - EvoNorm(4, variant="S2", groups=2).to(DOUBLE)(x)).abs().max() > 0.3  # fmt: skip  # noqa: E501
    torch.testing.assert_close(F.group_norm(x + 2, 2), F.group_norm(x, 2))


def test_the_batch_decides_where_instances_are_constant() -> None:
    levels = draw(4, 3, 1, 1)
    x = levels.expand(4, 3, 3, 3)
    norm = EvoNorm(3, eps=1e-12).to(DOUBLE)
    with torch.no_grad():
        norm.v1.zero_()
    torch.testing.assert_close(norm(x), x / levels.std(0, correction=0), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_activation_the_division_is_left(variant: evonorm.Variant) -> None:
    x = draw(3, 4, 3, 3)
    norm = EvoNorm(4, variant=variant, groups=2, apply_act=False).to(DOUBLE)
    assert norm.v1 is None
    torch.testing.assert_close(norm(-x), -norm(x), rtol=0, atol=1e-10)
    assert (EvoNorm(4, variant=variant, groups=2).to(DOUBLE)(x) - norm(x)).abs().max() > 0.1


def test_fusing_takes_the_pairs_and_nothing_else() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ResidualNet(widths=(8, 16), depth=1).eval()
    names = list(model.state_dict())
    fused = fuse_norm_act(model, lambda channels: EvoNorm(channels, variant="S0", groups=4))
    found = [name for name, module in fused.named_modules() if isinstance(module, EvoNorm)]
    assert sorted(found) == ["blocks.0.bn1", "blocks.1.bn1", "bn"]  # bn2 is read by the sum
    assert not any(module.training for module in fused.modules())
    assert list(model.state_dict()) == names
    x = torch.randn(2, 1, 8, 8)
    block, kept = model.blocks[0], fused.get_submodule("blocks.0.bn1")
    z = fused.get_submodule("bn")(model.stem(x))
    y = F.relu(block.bn2(block.conv2(kept(block.conv1(z)))) + z)
    block = model.blocks[1]
    inner = block.bn2(block.conv2(fused.get_submodule("blocks.1.bn1")(block.conv1(y))))
    expected = model.head(F.relu(inner + block.shortcut(y)).mean((2, 3)))
    torch.testing.assert_close(fused(x), expected)


def test_fusing_reads_modules_methods_and_group_norms() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = nn.GroupNorm(1, 4), *(nn.BatchNorm2d(4) for _ in range(3))
            self.act = nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.a(x))
            y = self.b(x).relu()
            z = self.d(self.c(y))
            return self.act(self.c(z.relu())) + z

    fused = fuse_norm_act(Net())
    assert [type(getattr(fused, name)).__name__ for name in "abcd"] == ["EvoNorm"] * 2 + ["BatchNorm2d"] * 2


def test_bad_input_is_refused() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    calls: list[tuple[Callable[[], object], type[Exception], str]] = [
        (lambda: EvoNorm(4, variant="B3"), BadInput, "variant must be one of"),  # type: ignore[arg-type]
        (lambda: EvoNorm(6, variant="S0", groups=4), BadInput, "groups must divide the 6 channels, got 4"),
        (lambda: EvoNorm(4)(torch.zeros(1, 4, 1, 1)), BadInput, "more than one value a channel"),
        (lambda: fuse_norm_act(nn.Sequential(nn.BatchNorm2d(2))), BadInput, "no norm that only an activation"),
        (lambda: fuse_norm_act(Branching()), Untraceable, "cannot be traced"),
        (lambda: Discovered((Node("add", (0,)),), 4), BadInput, "earlier values"),
        (lambda: Discovered((Node("neg", (4,)),), 4), BadInput, "earlier values"),
        (lambda: Discovered((Node("mean", (0,), "rows"),), 4), BadInput, "earlier values"),
        (lambda: discovery.random_genome(0, torch.Generator()), BadInput, "at least one node"),
        (lambda: discovery.evolve([], DATA), BadInput, "needs a proxy"),
    ]
    for call, kind, message in calls:
        with pytest.raises(kind, match=message):
            call()


B0 = (
    Node("mul", (0, 2)),
    Node("std", (0,), "instance"),
    Node("add", (4, 5)),
    Node("std", (0,), "batch"),
    Node("max", (6, 7)),
    Node("div", (0, 8)),
)
DATA = (draw(96, 1, 4, 4).float(), torch.arange(96) % 3)
DATA[0][DATA[1] == 1, :, :2] += 4
DATA[0][DATA[1] == 2, :, 2:] += 4


def proxy(layer: Callable[[int], nn.Module]) -> nn.Module:
    convs = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1)
    return nn.Sequential(convs[0], layer(8), convs[1], layer(8), nn.Flatten(), nn.Linear(32, 3))


def test_the_space_holds_evonorm() -> None:
    norm = EvoNorm(4).to(DOUBLE)
    x = draw(3, 4, 3, 3)
    torch.testing.assert_close(Discovered(B0, 4).to(DOUBLE)(x), norm(x), rtol=1e-2, atol=1e-2)
    groups = Discovered((Node("rms", (0,), "group"),), 4, groups=2).to(DOUBLE)(x)
    expected = x.unflatten(1, (2, 2)).square().mean((2, 3, 4)).add(1e-3).sqrt()
    torch.testing.assert_close(groups[:, 1, 0, 0], expected[:, 0])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12))
def test_random_and_mutated_layers_are_valid(seed: int, nodes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    genome = discovery.random_genome(nodes, generator)
    child = discovery.mutate(genome, generator)
    assert len(child) == nodes
    assert sum(one != other for one, other in zip(genome, child, strict=True)) <= 1
    x = draw(2, 4, 3, 3)
    assert Discovered(child, 4).to(DOUBLE)(x).shape == x.shape


def test_rejections_tell_sound_from_unsound() -> None:
    constant, exploding = (Node("mean", (3,), "batch"),), (Node("exp", (0,)), Node("exp", (4,)))
    assert discovery.proxy_accuracy(B0, proxy, DATA, steps=40) > 0.9
    assert discovery.proxy_accuracy(constant, proxy, DATA, steps=40) < 0.5
    assert discovery.worst_gradient(B0, proxy, DATA, steps=30) < 1e4
    assert discovery.worst_gradient(exploding, proxy, DATA, steps=100, stop=1e6) > 1e6
    assert discovery.judged(constant, [proxy], DATA, least=0.5, steps=40).rejected == "quality"
    assert discovery.judged(B0, [proxy], DATA, steps=20, most=1e-3).rejected == "stability"
    kept = discovery.judged(B0, [proxy, proxy], DATA, steps=20)
    assert kept.rejected == ""
    assert len(kept.accuracies) == 2


def test_search_starts_from_what_it_is_given_and_repeats() -> None:
    runs = [discovery.evolve([proxy], DATA, start=[B0], population=2, rounds=2, steps=5, seed=3) for _ in range(2)]
    assert runs[0] == runs[1]
    assert runs[0][0].genome == B0
    assert len(runs[0]) == 4
    assert discovery.non_dominated([Score(B0, (1.0,)), Score(B0, (0.5,))]) == [Score(B0, (1.0,))]
