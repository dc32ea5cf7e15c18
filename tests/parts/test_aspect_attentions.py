"""The ten attentions of the aspect ratio: each by hand or at the limit where it is softmax, and sums over heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from torchgraft.bench.models import Attention
from torchgraft.engines.attention import Pair, Rows, Window
from torchgraft.errors import BadInput
from torchgraft.parts.blocks import aspect_attentions as aspect
from torchgraft.parts.blocks.wide_attention import ATTENTIONS, WideEncoder, aspect_ratio_family

D, K, CONTEXT = 12, 4, 12
ONE_WAY = [name for name, kind in ATTENTIONS.items() if not getattr(kind, "two_ways", "")]
#: Parameters of a head besides the four projections, for R = 3 mixtures and blocks of 4 tokens.
OWN = {"linformer": 2 * 3 * CONTEXT, "sinkhorn": K * 3, "synthesizer": K * CONTEXT - D * K}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, sizes in (
        (aspect.LocalAttention, {"window": 3}),
        (aspect.LongformerAttention, {"leading": 2}),
        (aspect.BigBirdAttention, {"random": 2}),
        (aspect.LinformerAttention, {"rank": 3}),
        (aspect.SinkhornAttention, {"block": 4}),
    ):
        for name, value in sizes.items():
            monkeypatch.setattr(kind, name, value)


def built(name: str, heads: int = 3, *, causal: bool = False, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = WideEncoder(
        1, heads, d_model=D, d_head=K, d_ff=8, attention=name, causal=causal, context=CONTEXT, vocabulary=9
    )
    return model.layers[0].attn.double()  # type: ignore[union-attr]


def parts(attention: Any, x: Tensor) -> list[Tensor]:
    """Return queries, keys and values, (B, H, T, K)."""
    made = (part(x) for part in (attention.query, attention.key, attention.value))
    return [torch.unflatten(each, -1, (attention.num_heads, -1)).transpose(1, 2) for each in made]


def by_table(attention: Any, x: Tensor, seen: Tensor) -> Tensor:
    """Return softmax attention to the pairs in ``seen``, written out."""
    q, k, v = parts(attention, x)
    weights = (q @ k.mT / K**0.5).masked_fill(~seen, -torch.inf).softmax(-1)
    made: Tensor = attention.out((weights @ v).transpose(1, 2).flatten(2))
    return made


def inputs(tokens: int = CONTEXT) -> Tensor:
    return 2 * torch.randn(2, tokens, D, generator=torch.Generator().manual_seed(4)).double()


def test_there_are_the_ten_of_the_paper() -> None:
    assert len(ATTENTIONS) == 10


@pytest.mark.parametrize("name", list(ATTENTIONS))
def test_attentions_of_a_family_have_as_many_parameters_as_the_law_says(name: str) -> None:
    for model in aspect_ratio_family(6, d_model=D, d_head=K, d_ff=8, attention=name, context=CONTEXT):
        found = sum(value.numel() for layer in model.layers for value in layer.attn.parameters())  # type: ignore[union-attr]
        assert found == 6 * (4 * D * K + OWN.get(name, 0))


@pytest.mark.parametrize(
    ("name", "causal"), [(name, False) for name in ATTENTIONS] + [(name, True) for name in ONE_WAY]
)
def test_outputs_are_additive_over_heads(name: str, causal: bool) -> None:
    whole, x, total = built(name, causal=causal), inputs(), torch.zeros(2, CONTEXT, D).double()
    with torch.no_grad():
        for head in range(3):
            single = built(name, 1, causal=causal, seed=1 + head)
            for each in ("query", "key", "value"):
                if hasattr(whole, each):
                    getattr(single, each).weight.copy_(getattr(whole, each).weight[K * head : K * head + K])
            single.out.weight.copy_(whole.out.weight[:, K * head : K * head + K])
            for each in getattr(whole, "per_head", ()):
                getattr(single, each).copy_(getattr(whole, each)[head : head + 1])
            total += single(x)
        assert torch.allclose(total, whole(x), atol=1e-12)
        assert float(total.abs().max()) > 1e-2


@pytest.mark.parametrize("name", list(ATTENTIONS))
def test_padding_counts_for_nothing(name: str) -> None:
    attention, x = built(name), inputs()
    for real in (5, 8, 11):
        valid = (torch.arange(CONTEXT) < real).expand(2, -1)
        found = attention(torch.where(valid[..., None], x, 7.0), valid[:, None, None])
        assert torch.allclose(found[:, :real], attention(x[:, :real]), atol=1e-10)


@pytest.mark.parametrize("name", ONE_WAY)
def test_a_causal_attention_sees_no_later_token(name: str) -> None:
    attention, x = built(name, causal=True), inputs()
    other = x.clone()
    other[:, 7:] += 1
    assert torch.allclose(attention(x)[:, :7], attention(other)[:, :7], atol=1e-12)
    assert not torch.allclose(attention(x)[:, 7:], attention(other)[:, 7:], atol=1e-3)


@pytest.mark.parametrize("name", list(ATTENTIONS))
def test_every_parameter_gets_a_gradient_and_a_model_runs(name: str) -> None:
    torch.manual_seed(0)
    model = WideEncoder(2, 2, d_model=D, d_head=K, d_ff=8, attention=name, context=CONTEXT, vocabulary=9, classes=3)
    model(torch.randint(0, 9, (2, CONTEXT))).square().sum().backward()
    for layer in model.layers:
        for label, value in layer.attn.named_parameters():  # type: ignore[union-attr]
            assert value.grad is not None, label
            assert float(value.grad.abs().max()) > 0, label
    assert model(torch.randint(0, 9, (1, 5))).shape == (1, 3)


def table(name: str) -> Tensor:
    """Return who sees whom, pair by pair."""
    attention, seen = built(name), torch.zeros(CONTEXT, CONTEXT, dtype=torch.bool)
    for i in range(CONTEXT):
        for j in range(CONTEXT):
            near, leads = abs(i - j) < 3, i < 2 or j < 2
            found = {
                "local": near,
                "longformer": near or leads,
                "bigbird": near or leads or (name == "bigbird" and bool(attention.drawn[i, j])),
                "sparse": near or (i - j) % 3 == 0,
            }
            seen[i, j] = found[name]
    return seen


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["local", "longformer", "bigbird", "sparse"])
def test_sparse_types_are_softmax_over_the_pairs_they_name(name: str, causal: bool) -> None:
    attention, x = built(name, causal=causal), inputs()
    seen = table(name).tril() if causal else table(name)
    assert torch.allclose(attention(x), by_table(attention, x, seen), atol=1e-12)
    attention.window = CONTEXT
    everything = torch.ones(CONTEXT, CONTEXT, dtype=torch.bool)
    assert torch.allclose(attention(x), by_table(attention, x, everything.tril() if causal else everything), atol=1e-12)


def test_bigbird_sees_the_union_of_its_three_patterns_and_so_many_random_keys() -> None:
    attention = built("bigbird")
    assert torch.equal(attention.drawn.sum(1), torch.full((CONTEXT,), 2))
    assert not bool((attention.drawn & ~table("longformer")).sum() == 0)
    place = torch.arange(CONTEXT)
    rows = Rows(slice(0, CONTEXT), slice(0, CONTEXT), place, place)
    union = Window(3).seen(rows) | aspect.Leading(2).seen(rows) | attention.drawn
    assert torch.equal(attention.pattern(CONTEXT).seen(rows)[0, 0], union)
    assert torch.equal(attention.drawn, built("bigbird", seed=9).drawn)


@pytest.mark.parametrize("mask", [aspect.Leading(2), aspect.Strided(3)])
def test_masks_say_of_pairs_what_they_say_of_blocks(mask: Any) -> None:
    place = torch.arange(CONTEXT)
    rows = Rows(slice(0, CONTEXT), slice(0, CONTEXT), place, place)
    at = Pair(place, place, place, place, place[:, None], place[None], place)
    assert torch.equal(mask.of_pair(at), mask.seen(rows))


def test_linformer_with_the_identity_is_softmax_and_by_hand_otherwise() -> None:
    attention, x = built("linformer"), inputs()
    q, k, v = parts(attention, x)
    few, mixed = attention.keys.detach() @ k, attention.values.detach() @ v  # (B, H, R, K)
    assert few.shape[2] == 3
    expected = attention.out(((q @ few.mT / K**0.5).softmax(-1) @ mixed).transpose(1, 2).flatten(2))
    assert torch.allclose(attention(x), expected, atol=1e-12)
    for name in attention.per_head:
        setattr(attention, name, torch.nn.Parameter(torch.eye(CONTEXT).double().expand(3, -1, -1).clone()))
    whole = torch.ones(CONTEXT, CONTEXT, dtype=torch.bool)
    assert torch.allclose(attention(x), by_table(attention, x, whole), atol=1e-12)


def test_features_of_performer_have_the_mean_of_softmax_and_approach_it() -> None:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (0.7 * torch.randn(1, 1, 5, K, generator=draw).double() for _ in range(3))
    exact = (q @ k.mT / K**0.5).exp()
    draws = []
    for _ in range(4000):
        directions = torch.randn(16, K, generator=draw).double()
        draws.append(aspect.log_features(q, directions).exp() @ aspect.log_features(k, directions).exp().mT)
    found = torch.stack(draws)
    error = found.std(0) / len(draws) ** 0.5
    assert bool(((found.mean(0) - exact).abs() < 5 * error).all())
    assert bool((error < 0.1 * exact).all())
    wrong = []
    for count in (16, 200_000):
        directions = torch.randn(count, K, generator=draw).double()
        phi = [aspect.log_features(each, directions).exp() for each in (q, k)]
        found = aspect.mixed_by_features(*phi, v, causal=False)
        wrong.append(float((found - exact / exact.sum(-1, keepdim=True) @ v).norm()))
    assert wrong[1] < 0.03 < wrong[0]


def test_performer_by_hand_and_its_directions_are_orthogonal_by_blocks() -> None:
    attention, x = built("performer"), inputs()
    q, k, v = parts(attention, x)
    phi = [aspect.log_features(each, attention.directions).exp() for each in (q, k)]
    weights = phi[0] @ phi[1].mT
    expected = attention.out((weights / weights.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2))
    assert torch.allclose(attention(x), expected, atol=1e-12)
    block = F.normalize(attention.directions[:K], dim=1)
    assert torch.allclose(block @ block.mT, torch.eye(K).double(), atol=1e-6)
    assert attention.directions.shape == (64, K)
    assert bool(attention(100 * x).isfinite().all())


def test_the_matrix_of_sinkhorn_is_doubly_stochastic_and_keeps_padding_apart() -> None:
    attention, x = built("sinkhorn"), inputs()
    attention.iterations = 200
    q = torch.unflatten(parts(attention, x)[0].transpose(1, 2), 1, (3, 4))  # (B, N, c, H, K)
    real = torch.ones(2, 3, 4, dtype=torch.bool)
    real[1, 2] = False
    sort = attention.permutation(q, real)
    for axis in (-1, -2):
        assert torch.allclose(sort.sum(axis), torch.ones(2, 3, 3).double(), atol=1e-9)
    assert float((sort - 1 / 3).detach().abs().max()) > 0.01
    assert torch.equal(sort[1, :, 2, :2], torch.zeros(3, 2).double())
    assert torch.equal(sort[1, :, :2, 2], torch.zeros(3, 2).double())


def test_sinkhorn_by_hand_and_with_one_block_softmax() -> None:
    attention, x = built("sinkhorn"), inputs()
    q, k, v = parts(attention, x)  # (B, H, T, K)
    sort = attention.permutation(
        torch.unflatten(q.transpose(1, 2), 1, (3, 4)), torch.ones(2, 3, 4, dtype=torch.bool)
    ).detach()
    mixed = torch.zeros_like(q)
    for block in range(3):
        own = slice(4 * block, 4 * block + 4)
        near = []
        for y in (k, v):
            blocks = torch.unflatten(y, 2, (3, 4))  # (B, H, N, c, K)
            brought = sum(sort[:, :, block, other, None, None] * blocks[:, :, other] for other in range(3))
            near.append(torch.cat([y[:, :, own], brought], 2))  # type: ignore[list-item]
        mixed[:, :, own] = (q[:, :, own] @ near[0].mT / K**0.5).softmax(-1) @ near[1]
    assert torch.allclose(attention(x), attention.out(mixed.transpose(1, 2).flatten(2)), atol=1e-12)
    short = inputs(4)
    assert torch.allclose(attention(short), by_table(attention, short, torch.ones(4, 4, dtype=torch.bool)), atol=1e-12)


def test_weights_of_synthesizer_do_not_depend_on_other_tokens() -> None:
    attention, x = built("synthesizer"), inputs()
    q = torch.unflatten(attention.query(x), -1, (3, K)).transpose(1, 2)
    weights = (q.relu() @ attention.scores).softmax(-1)  # (B, H, T, T), of one token each
    v = torch.unflatten(attention.value(x), -1, (3, K)).transpose(1, 2)
    assert torch.allclose(attention(x), attention.out((weights @ v).transpose(1, 2).flatten(2)), atol=1e-12)
    with torch.no_grad():
        other = x.clone()
        other[:, 1:] += torch.randn(2, CONTEXT - 1, D, generator=torch.Generator().manual_seed(1)).double()
        attention.value = torch.nn.Linear(D, 3 * K, bias=False).double()
        attention.value.weight.zero_()
        attention.value.forward = lambda y: torch.arange(CONTEXT).double()[None, :, None].expand(2, -1, 3 * K)
        assert torch.allclose(attention(x)[:, 0], attention(other)[:, 0], atol=1e-12)  # values fixed: weights are left
        assert not torch.allclose(attention(x)[:, 1:], attention(other)[:, 1:], atol=1e-3)
    assert not hasattr(attention, "key")


def test_what_has_no_causal_form_says_why() -> None:
    for name in set(ATTENTIONS) - set(ONE_WAY):
        with pytest.raises(BadInput, match="has no causal form: "):
            WideEncoder(1, 1, attention=name, causal=True)
        with pytest.raises(BadInput, match="has no causal form: "):
            ATTENTIONS[name](8, 1, causal=True)(torch.zeros(1, 2, 8))
    assert issubclass(ATTENTIONS["softmax"], Attention)
    assert set(ATTENTIONS) - set(ONE_WAY) == {"linformer", "sinkhorn"}
