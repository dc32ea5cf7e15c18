"""The compiled passes of norms say what torch's operators say, in float64, and stay away where they cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchgraft.engines import native as compiler
from torchgraft.engines.normalize import native
from torchgraft.parts.norms.evonorm import EvoNorm
from torchgraft.parts.norms.ibn_net import IBN
from torchgraft.parts.norms.powernorm import PowerNorm
from torchgraft.parts.norms.slab_prepbn import PRepBN, RepBN
from torchgraft.parts.norms.weight_standardization_bcn import BatchChannelNorm

needs_compiler = pytest.mark.skipif(
    not native.usable(torch.ones(1)), reason="there is no C++ compiler on this machine, so torch's operators are used"
)
IMAGES, TOKENS = (3, 8, 5, 7), (3, 11, 24)
#: Sums of float32 over a few hundred values, against the same in float64.
TOLERANCE = 3e-5
LAYERS: list[Any] = [
    pytest.param(lambda: IBN(8), IMAGES, id="ibn"),
    pytest.param(lambda: BatchChannelNorm(8, groups=2, estimate=False), IMAGES, id="bcn"),
    *(pytest.param(lambda v=v: EvoNorm(8, variant=v, groups=2), IMAGES, id=f"evonorm-{v}") for v in ("B0", "B1", "B2")),
    *(pytest.param(lambda v=v: EvoNorm(8, variant=v, groups=2), IMAGES, id=f"evonorm-{v}") for v in ("S0", "S1", "S2")),
    pytest.param(lambda: PowerNorm(24), TOKENS, id="powernorm"),
    pytest.param(lambda: PowerNorm(24, group_scale=3), TOKENS, id="powernorm-groups"),
    pytest.param(lambda: PowerNorm(24, group_scale=0), TOKENS, id="powernorm-unscaled"),
    pytest.param(lambda: PowerNorm(24, warmup=5), TOKENS, id="powernorm-warmup"),
    pytest.param(lambda: PRepBN(24, steps=10), TOKENS, id="prepbn"),
    pytest.param(lambda: PRepBN(24, steps=2), TOKENS, id="prepbn-ended"),
    pytest.param(lambda: RepBN(24), TOKENS, id="repbn"),
    # outputs that outgrow the cache, of rows that can and that cannot be written past it
    *(
        pytest.param(lambda made=made, width=width: made(width), (1, 2_060, width), id=f"{name}-large-{width}")
        for width in (512, 515)
        for name, made in (
            ("prepbn", lambda width: PRepBN(width, steps=10)),
            ("repbn", RepBN),
            ("powernorm", PowerNorm),
        )
    ),
]


def _both_ways(layer: nn.Module, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    leaf = x.clone().requires_grad_()
    out = layer(leaf)
    named = dict(layer.named_parameters())
    grads = torch.autograd.grad(out, [leaf, *named.values()], upstream, allow_unused=True)
    found = {"output": out.detach(), **dict(layer.named_buffers())}
    found |= {f"to {name}": grad for name, grad in zip(["x", *named], grads, strict=True) if grad is not None}
    return {name: value.detach().double() for name, value in found.items() if value is not None}


def _made(build: Any) -> nn.Module:
    layer: nn.Module = build().train()
    torch.manual_seed(0)
    with torch.no_grad():
        for value in layer.parameters():
            value.add_(0.3 * torch.randn_like(value))
        for name, value in layer.named_buffers():
            if value.is_floating_point():
                value.copy_(0.5 + torch.rand_like(value) if name != "nu" else 0.1 * torch.randn_like(value))
            elif name == "step":
                value.fill_(3)
    return layer


@needs_compiler
@pytest.mark.parametrize(("build", "shape"), LAYERS)
@pytest.mark.parametrize("offset", [0.0, 20.0])
def test_compiled_layers_say_what_float64_says(build: Any, shape: tuple[int, ...], offset: float) -> None:
    torch.manual_seed(1)
    x, upstream = torch.randn(shape) * 2 + offset, torch.randn(shape)
    fast = _both_ways(_made(build), x, upstream)
    exact = _both_ways(_made(build).double(), x.double(), upstream.double())
    assert fast.keys() == exact.keys()
    for name, value in exact.items():
        room = TOLERANCE * (1.0 + offset) * max(1.0, float(value.abs().max()))
        torch.testing.assert_close(fast[name], value, atol=room, rtol=0.0, msg=lambda m, name=name: f"{name}: {m}")


@needs_compiler
@pytest.mark.parametrize("rows", [2, 7, 8, 9, 61])
def test_the_variance_of_columns_far_from_zero_is_exact(rows: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows, 24) + 1_000.0
    norm = RepBN(24, momentum=1.0).train()
    norm(x)
    exact = x.double()
    torch.testing.assert_close(norm.running_mean.double(), exact.mean(0), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(norm.running_var.double(), exact.var(0), rtol=1e-4, atol=0.0)


@needs_compiler
def test_padding_counts_for_nothing_in_the_compiled_power_norm() -> None:
    torch.manual_seed(0)
    x, mask = torch.randn(TOKENS), torch.rand(TOKENS[:2]) > 0.4
    one, other = _made(lambda: PowerNorm(24)), _made(lambda: PowerNorm(24))
    kept = one(x, mask=mask)
    alone = other(x[mask][None])
    torch.testing.assert_close(kept[mask], alone[0])
    torch.testing.assert_close(one.running_square, other.running_square)
    assert not kept[~mask].any()


@needs_compiler
@pytest.mark.parametrize("kind", ["affine", "larger", "gated", "silu"])
def test_kernels_are_used_and_answer_for_extreme_rows(kind: native.Kind) -> None:
    x = torch.tensor([[0.0, -1e4, 1e4, 90.0, -90.0, 1e-30]])
    numbers = [torch.ones(1) for _ in range(5)]
    out = native.rows_forward(kind, x, numbers[: {"affine": 2, "larger": 5, "gated": 3, "silu": 2}[kind]])
    assert bool(out.isfinite().all())
    if kind == "silu":
        torch.testing.assert_close(out, nn.functional.silu(x) + 1.0, rtol=1e-6, atol=1e-6)


@needs_compiler
def test_nan_goes_through() -> None:
    out = EvoNorm(2, variant="S0", groups=1)(torch.full((1, 2, 2, 2), float("nan")))
    assert bool(out.isnan().all())


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("build", [PowerNorm, RepBN, lambda width: PRepBN(width, steps=10)])
def test_the_number_of_threads_changes_rounding_only(build: Any, threads: int) -> None:
    before = torch.get_num_threads()
    torch.manual_seed(1)
    x, upstream = torch.randn(TOKENS), torch.randn(TOKENS)
    wanted = _both_ways(_made(lambda: build(24)), x, upstream)
    try:
        torch.set_num_threads(threads)
        found = _both_ways(_made(lambda: build(24)), x, upstream)
    finally:
        torch.set_num_threads(before)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


def test_other_values_are_left_to_torch() -> None:
    assert not native.usable(torch.ones(2, dtype=torch.float64))
    assert not native.usable(torch.ones(2, dtype=torch.bfloat16))
    assert not native.usable(torch.ones(0))
    assert not native.usable(torch.ones(2, device="meta"))


def test_without_a_compiler_the_layers_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, upstream = torch.randn(IMAGES), torch.randn(IMAGES)
    fast = _both_ways(_made(lambda: EvoNorm(8)), x, upstream)
    monkeypatch.setattr(native, "_functions", lambda: None)
    assert not native.usable(x)
    slow = _both_ways(_made(lambda: EvoNorm(8)), x, upstream)
    for name, value in slow.items():
        torch.testing.assert_close(fast[name], value, rtol=1e-4, atol=1e-5)


def test_a_source_that_does_not_compile_is_not_fatal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHGRAFT_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "broken.cpp"
    source.write_text("this is no C++\n")
    assert compiler.library(source) is None
    good = tmp_path / "good.cpp"
    good.write_text('extern "C" int answer() { return 42; }\n')
    found = compiler.library(good)
    if found is not None:  # where there is a compiler
        assert found.answer() == 42
        assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".so"]
    monkeypatch.setenv("TORCHGRAFT_NO_COMPILER", "1")
    other = tmp_path / "other.cpp"
    other.write_text('extern "C" int answer() { return 43; }\n')
    assert compiler.library(other) is None


def test_a_library_that_others_may_write_to_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHGRAFT_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "good.cpp"
    source.write_text('extern "C" int answer() { return 44; }\n')
    if compiler.library(source) is None:
        return  # there is no compiler, so nothing is opened at all
    (made,) = (tmp_path / "cache").iterdir()
    made.chmod(0o777)
    compiler.library.cache_clear()
    assert compiler.library(source) is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_trace_records_torchs_operators() -> None:
    told = []

    def asked(x: Tensor) -> Tensor:
        told.append(native.usable(x))
        return x + 1

    torch.jit.trace(asked, (torch.ones(2),), check_trace=False)
    assert told == [False]
    assert native.usable(torch.ones(2))
