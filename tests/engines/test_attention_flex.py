"""FlexAttention as a form of the pipeline: the numbers and gradients of the matrix written out, and what it refuses."""

from __future__ import annotations

import logging
import shutil
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from torchgraft.engines.attention import (
    L1,
    Alibi,
    Chain,
    Gaussian,
    Given,
    Harmonic,
    Mask,
    Padding,
    Pair,
    Reweighted,
    Rows,
    Shifted,
    Tempered,
    Window,
    attend,
    dot,
    exp,
    flex,
    l1,
    relu,
    sigmoid,
    softmax,
    softplus,
    unnormalized,
)
from torchgraft.engines.attention.blocked import Pipeline, Places
from torchgraft.engines.attention.masks import Causal
from torchgraft.errors import BadInput
from torchgraft.parts.mixers.relu_attention import mean_relu
from torchgraft.parts.mixers.sigmoid_attention import log_count_sigmoid
from torchgraft.parts.mixers.softplus_attention_lssar import LogScaled

# Dynamo looks at .grad of every input, and hides the warning of that only where warnings are no errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
ATTEND = import_module("torchgraft.engines.attention.attend")
DOUBLE = torch.float64
BATCH, HEADS, GROUPS, KEY, VALUE = 2, 4, 2, 6, 5
SIDE, TOKENS = 5, 25


class Axes(Mask):
    """Tokens of a grid see their row and their column."""

    def seen(self, rows: Rows) -> Tensor:
        q, k = rows.query_place[:, None], rows.key_place
        return (q // SIDE == k // SIDE) | (q % SIDE == k % SIDE)

    def of_pair(self, at: Pair) -> Tensor:
        q, k = at.query_place, at.key_place
        return (q // SIDE == k // SIDE) | (q % SIDE == k % SIDE)


class Blind(Mask):
    """A mask of which only blocks can be asked."""

    def seen(self, rows: Rows) -> Tensor:
        return rows.distance() % 3 == 0


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run flex_attention by its own operators, as on CUDA with gradients: torch refuses these on the CPU by a check."""
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(flex_attention, "_validate_device", lambda *heads: None)
    monkeypatch.setattr(ATTEND, "attend_by_flex", partial(flex.attend_by_flex, backend="eager"))


def heads(tokens: int = TOKENS, sources: int | None = None, seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = ((tokens, HEADS, KEY), (sources or tokens, GROUPS, KEY), (sources or tokens, GROUPS, VALUE))
    return [torch.randn(BATCH, *shape, generator=draw, dtype=DOUBLE, requires_grad=True) for shape in shapes]


def agree(leaves: list[Tensor], more: list[Tensor] | None = None, **options: Any) -> None:
    found = []
    leaves = [*leaves, *(more or [])]
    for form in ("dense", "flex"):
        out = attend(*leaves[:3], form=form, **options)  # type: ignore[arg-type]
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=DOUBLE)
        found.append([out, *torch.autograd.grad((out * weight).sum(), leaves)])
    for dense, other in zip(*found, strict=True):
        assert float(dense.detach().abs().max()) > 1e-4
        assert torch.allclose(dense, other, atol=1e-11, rtol=1e-9)


def masks() -> dict[str, Mask | Tensor | None]:
    draw = torch.Generator().manual_seed(7)
    real = torch.rand(BATCH, TOKENS, generator=draw) > 0.3
    real[0, :9] = False  # with causal, rows that see nothing
    return {
        "none": None,
        "window": Window(4),
        "padding": real,
        "pairs": torch.rand(BATCH, HEADS, TOKENS, TOKENS, generator=draw) > 0.4,
        "pairs for all": torch.rand(1, 1, TOKENS, TOKENS, generator=draw) > 0.4,
        "window and padding": Window(6) & Padding(real),
        "axes": Axes(),
        "axes or window": Axes() | Window(3),
        "only blocks": Window(9) & Blind(),
    }


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("mask", "causal"),
    [
        ("none", False),
        ("none", True),
        ("window", False),
        ("padding", False),
        ("padding", True),
        ("pairs", False),
        ("pairs for all", True),
        ("window and padding", True),
        ("axes", False),
        ("axes or window", True),
        ("only blocks", True),
    ],
)
def test_every_mask_equals_the_matrix_and_so_do_all_gradients(mask: str, causal: bool) -> None:
    agree(heads(), mask=masks()[mask], causal=causal)


def learned() -> dict[str, tuple[dict[str, Any], list[Tensor]]]:
    def drawn(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=torch.Generator().manual_seed(5), dtype=DOUBLE).add_(0.2).requires_grad_()

    slope, per_head, per_token, per_pair, bias = (
        drawn(HEADS),
        drawn(HEADS, 1, 1),
        drawn(BATCH, HEADS, TOKENS, 1),
        drawn(BATCH, 1, TOKENS, TOKENS),
        drawn(HEADS, TOKENS, 1),
    )
    chain = Chain((Tempered(per_token), Chain((Shifted(bias), Alibi(slope))), Harmonic(slope), sigmoid))
    counted = Chain((LogScaled(KEY), softplus))
    return {
        "scale of each head": ({"transform": Tempered(per_head)}, [per_head]),
        "temperature of each pair": ({"transform": Tempered(per_pair)}, [per_pair]),
        "alibi": ({"transform": Alibi(slope)}, [slope]),
        "harmonic": ({"transform": Harmonic(slope)}, [slope]),
        "chain with a slope twice": ({"transform": chain, "normalize": l1}, [per_token, bias, slope]),
        "log N softmax": ({"transform": LogScaled(KEY)}, []),
        "log N softplus": ({"transform": counted, "normalize": L1(eps=0.1)}, []),
        "sigmoid": ({"transform": Chain((Alibi(slope), sigmoid)), "normalize": unnormalized}, [slope]),
        "sigmoid less log n": ({"transform": log_count_sigmoid, "normalize": unnormalized}, []),
        "relu": ({"transform": relu, "normalize": unnormalized}, []),
        "mean relu": ({"transform": mean_relu, "normalize": unnormalized}, []),
        "relu l1": ({"transform": relu, "normalize": l1}, []),
        "softplus": ({"transform": softplus, "normalize": unnormalized}, []),
        "exp": ({"transform": exp, "normalize": L1(eps=1e-3)}, []),
    }


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("pipeline", list(learned()))
def test_every_pipeline_equals_the_matrix_and_so_do_gradients_of_what_is_learned(pipeline: str) -> None:
    stages, tensors = learned()[pipeline]
    agree(heads(), tensors, mask=masks()["padding"], causal=True, **stages)


@pytest.mark.usefixtures("uncompiled")
def test_queries_and_keys_may_stand_anywhere() -> None:
    stages: dict[str, Any] = {"transform": Chain((Alibi(torch.rand(HEADS)), Harmonic(torch.rand(HEADS))))}
    agree(heads(4, TOKENS), causal=True, **stages)  # a cache: the last four
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(1))
    agree(heads(), causal=True, key_place=order, mask=Window(9), **stages)
    agree(heads(3, TOKENS), causal=True, query_place=torch.tensor([40, 3, 9]), **stages)


@pytest.mark.usefixtures("uncompiled")
def test_rows_that_see_nothing_are_zero_and_so_are_their_gradients() -> None:
    q, k, v = heads()
    hidden = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    hidden[0] = False
    for stages in ({}, {"transform": sigmoid, "normalize": unnormalized}, {"transform": softplus, "normalize": l1}):
        out = attend(q, k, v, mask=hidden, form="flex", **stages)  # type: ignore[arg-type]
        assert torch.equal(out[0], torch.zeros_like(out[0]))
        for grad in torch.autograd.grad(out.square().sum(), [q, k, v]):
            assert bool(grad.isfinite().all())
            assert torch.equal(grad[0], torch.zeros_like(grad[0]))


@pytest.mark.usefixtures("uncompiled")
def test_no_heads_no_tokens_and_narrow_numbers() -> None:
    q, k, v = (x.detach() for x in heads())
    assert attend(q[:, :0], k, v, form="flex", causal=True).shape == (BATCH, 0, HEADS, VALUE)
    agree(heads(), transform=exp, normalize=L1(eps=0.0), causal=True)
    half = attend(*(x.bfloat16() for x in (q, k, v)), transform=Alibi(torch.rand(HEADS)), form="flex")
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("mask", [Causal(), Window(100), Causal() & Window(200)])
@pytest.mark.parametrize(("tokens", "sources"), [(300, 400), (256, 256), (1, 400)])
def test_blocks_are_those_that_torch_finds_by_asking_every_pair(mask: Mask, tokens: int, sources: int) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    place, keys = torch.arange(sources - tokens, sources), torch.arange(sources)

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return flex._sees(mask, Pair(b, h, i, j, place[i], keys[j], keys))

    expected = create_block_mask(seen, None, None, tokens, sources, device="cpu")
    found = flex._blocks(mask, Places(place, keys, ordered=True))
    for mine, theirs in zip(
        found[:4],
        (expected.kv_num_blocks, expected.kv_indices, expected.full_kv_num_blocks, expected.full_kv_indices),
        strict=True,
    ):
        assert theirs is not None
        assert torch.equal(mine, theirs)
    table = mask.seen(Rows(slice(0, tokens), slice(0, sources), place, keys))
    assert torch.equal(found.counts[0, 0, :, 0], table.sum(-1))


@pytest.mark.usefixtures("uncompiled")
def test_several_blocks_with_holes_equal_the_matrix() -> None:
    agree(heads(300), mask=Window(40), causal=True, transform=Alibi(torch.rand(HEADS)))


@pytest.mark.usefixtures("uncompiled")
def test_a_pipeline_is_compiled_once_and_not_at_every_call() -> None:
    from torch._dynamo.utils import counters

    def run(seed: int) -> None:
        transform = Chain((Tempered(torch.rand(HEADS, 1, 1)), Alibi(torch.rand(HEADS))))
        mask = Padding(torch.rand(BATCH, TOKENS) > 0.2)
        attend(*(x.detach() for x in heads(seed=seed)), transform=transform, mask=mask, form="flex")  # type: ignore[misc]

    run(0)
    before = counters["stats"]["unique_graphs"]
    assert before > 0
    run(1)
    run(2)
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_compiled_kernel_of_the_cpu_equals_the_matrix() -> None:
    real = torch.ones(BATCH, 150, dtype=torch.bool)
    real[0, 100:] = False
    q, k, v = (x.detach().float() for x in heads(150))
    options: dict[str, Any] = {"transform": Alibi(torch.rand(HEADS)), "mask": real, "causal": True}
    expected = attend(q.double(), k.double(), v.double(), form="dense", **options)
    assert torch.allclose(attend(q, k, v, form="flex", **options).double(), expected, atol=1e-5)


def test_what_flex_cannot_do_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (x.detach().float() for x in heads())
    cases: list[tuple[str, dict[str, Any]]] = [
        ("Gaussian is not", {"score": Gaussian(), "transform": exp, "normalize": l1}),
        ("no dropout", {"dropout": 0.5}),
        ("does not speak of single pairs", {"transform": lambda s, rows: s.softmax(-1)}),
        ("Reweighted is no function", {"transform": softplus, "normalize": Reweighted(l1)}),
        ("have no logarithm", {"normalize": unnormalized}),
        ("have no logarithm", {"transform": Chain((relu, Alibi(torch.rand(HEADS)))), "normalize": unnormalized}),
        ("have no logarithm", {"transform": relu, "normalize": L1(signed=True)}),
        ("does not return; use 'blocks'", {"transform": sigmoid, "normalize": unnormalized}),
    ]
    for words, options in cases:
        with pytest.raises(BadInput, match=words):
            attend(q, k, v, form="flex", **options)
    with pytest.raises(BadInput, match=r"got torch\.float64"):
        attend(q.double(), k, v, form="flex", transform=Alibi(torch.rand(HEADS)))
    with pytest.raises(BadInput, match="no backward pass on the CPU"):
        attend(q.requires_grad_(), k, v, form="flex")
    q = q.detach()
    with pytest.raises(BadInput, match="no backward pass on the CPU"):
        attend(q, k, v, form="flex", transform=Alibi(torch.rand(HEADS, requires_grad=True)))
    with pytest.raises(BadInput, match="cpu and cuda, got meta"):
        attend(q.to("meta"), k.to("meta"), v.to("meta"), form="flex", transform=Alibi(torch.rand(HEADS)))
    monkeypatch.setattr(flex, "_TABLE", 100)
    with pytest.raises(BadInput, match="write Blind out"):
        attend(q, k, v, form="flex", mask=Blind())


def test_a_failed_compilation_is_said_once_and_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    q, k, v = (x.detach().float() for x in heads())
    tried = 0

    def broken(*given: Any) -> Any:
        def call(*given: Any) -> Any:
            nonlocal tried
            tried += 1
            raise torch._dynamo.exc.TorchDynamoException("no compiler\nand more")

        return call

    monkeypatch.setattr(flex, "_compiled", broken)
    monkeypatch.setattr(flex, "_FAILED", {})
    slopes = torch.rand(HEADS)
    for _ in range(2):
        with pytest.raises(BadInput, match=r"could not be compiled here \(no compiler\); use 'blocks'"):
            attend(q, k, v, form="flex", transform=Alibi(slopes))
    assert tried == 1
    monkeypatch.setattr(ATTEND, "suits", lambda *given: True)
    with caplog.at_level(logging.WARNING, "torchgraft"), torch.no_grad():
        found = attend(q, k, v, transform=Alibi(slopes))
        assert torch.equal(found, attend(q, k, v, transform=Alibi(slopes), form="blocks"))
    assert "could not be compiled" in caplog.text


def test_auto_takes_it_on_cuda_with_triton_and_for_what_is_known_to_be_right(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._subclasses import FakeTensorMode

    def on(device: str, dtype: torch.dtype = torch.float16, size: int = 64) -> list[Tensor]:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return [torch.empty(1, 8, HEADS, size, dtype=dtype, device=device) for _ in range(3)]

    def pipeline(**options: Any) -> Pipeline:
        return Pipeline(
            **{"score": dot, "transform": Alibi(torch.ones(HEADS)), "normalize": softmax, "scale": 1.0, **options}
        )

    monkeypatch.setattr(flex, "_triton", lambda: True)
    assert flex.suits(pipeline(mask=Window(3) & Causal()), *on("cuda"))
    assert not flex.suits(pipeline(), *on("cpu"))
    assert not flex.suits(pipeline(), *on("cuda", torch.float64))
    assert not flex.suits(pipeline(), *on("cuda", size=8))
    assert not flex.suits(pipeline(dropout=0.1), *on("cuda"))
    assert not flex.suits(pipeline(mask=Blind()), *on("cuda"))
    assert not flex.suits(pipeline(transform=sigmoid, normalize=unnormalized), *on("cuda"))
    assert not flex.suits(pipeline(transform=Alibi(torch.ones(HEADS, requires_grad=True))), *on("cuda"))
    monkeypatch.setattr(flex, "_triton", lambda: False)
    assert not flex.suits(pipeline(), *on("cuda"))


def test_auto_leaves_the_cpu_to_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any, **options: Any) -> Tensor:
        raise AssertionError

    monkeypatch.setattr(ATTEND, "attend_by_flex", refuse)
    q, k, v = (x.detach() for x in heads())
    attend(q, k, v, transform=Alibi(torch.rand(HEADS)), mask=Given(torch.ones(1, 1, 1, 1, dtype=torch.bool)))
    with pytest.raises(AssertionError):
        attend(q, k, v, form="flex")
