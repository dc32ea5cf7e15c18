"""Aspect ratios: what stays and what falls in a family, heads as sums, and layers merged in a model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.models import Attention, ResidualNet, VisionTransformer
from torchgraft.bench.task import Split, Task
from torchgraft.errors import BadInput
from torchgraft.parts.blocks.wide_attention import (
    ATTENTIONS,
    WideEncoder,
    aspect_ratio_family,
    compare_aspect,
    merge_layers,
)

#: Those whose parameters are projections only; the others are tested beside these in test_aspect_attentions.
PROJECTED = [name for name, kind in ATTENTIONS.items() if not getattr(kind, "per_head", ())]


def count(module: nn.Module) -> int:
    return sum(value.numel() for value in module.parameters())


def moved(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.3 * torch.randn_like(value))
    return model.double().eval()


@pytest.mark.parametrize("total", [8, 12])
@pytest.mark.parametrize("attention", PROJECTED)
def test_attentions_of_a_family_have_equal_parameters_and_the_rest_falls_exactly(total: int, attention: str) -> None:
    d, k, ff = 24, 5, 40
    family = aspect_ratio_family(total, d_model=d, d_head=k, d_ff=ff, attention=attention)
    assert [len(model.layers) * model.num_heads for model in family] == [total] * len(family)
    assert len(family[0].layers) == total
    assert len(family[-1].layers) == 1
    for model in family:
        assert sum(count(layer.attn) for layer in model.layers) == 4 * d * total * k  # type: ignore[arg-type]
        layers = len(model.layers)
        assert count(model) - count(family[-1]) == (layers - 1) * (2 * d * ff + ff + d + 2 * 2 * d)


@pytest.mark.parametrize("attention", PROJECTED)
@pytest.mark.parametrize("causal", [False, True])
def test_outputs_are_additive_over_heads_and_a_wide_layer_is_the_union_of_narrow_ones(
    attention: str, causal: bool
) -> None:
    def narrow(heads: int) -> Attention:
        model = WideEncoder(1, heads, d_model=12, d_head=4, d_ff=8, attention=attention, causal=causal)
        found: Attention = moved(model).layers[0].attn  # type: ignore[assignment, index, union-attr]
        return found

    def union(parts: list[Attention]) -> Attention:
        wide = narrow(sum(part.num_heads for part in parts))
        with torch.no_grad():
            for name in ("query", "key", "value"):
                getattr(wide, name).weight.copy_(torch.cat([getattr(part, name).weight for part in parts]))
            wide.out.weight.copy_(torch.cat([part.out.weight for part in parts], 1))
        return wide

    x = torch.randn(2, 7, 12).double()
    one, two = narrow(3), narrow(2)
    with torch.no_grad():
        two.query.weight.add_(torch.randn_like(two.query.weight))
        assert torch.allclose(union([one, two])(x), one(x) + two(x), atol=1e-12)
        heads = []
        for head in range(3):
            single = narrow(1)
            for name in ("query", "key", "value"):
                getattr(single, name).weight.copy_(getattr(one, name).weight[4 * head : 4 * head + 4])
            single.out.weight.copy_(one.out.weight[:, 4 * head : 4 * head + 4])
            heads.append(single(x))
        assert torch.allclose(sum(heads), one(x), atol=1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize("causal", [False, True])
def test_linear_attention_by_hand(causal: bool) -> None:
    model = moved(WideEncoder(1, 2, d_model=6, d_head=3, d_ff=4, attention="linear", causal=causal))
    attention: Attention = model.layers[0].attn  # type: ignore[assignment, index, union-attr]
    x = torch.randn(1, 4, 6).double()
    q, k, v = (part(x)[0].view(4, 2, 3) for part in (attention.query, attention.key, attention.value))
    rows = []
    for t in range(4):
        row = []
        for h in range(2):
            seen = range(t + 1) if causal else range(4)
            weight = torch.stack([(F.elu(q[t, h]) + 1) @ (F.elu(k[s, h]) + 1) for s in seen])
            row.append(sum(w * v[s, h] for w, s in zip(weight / weight.sum(), seen, strict=True)))
        rows.append(torch.cat(row))  # type: ignore[arg-type]
    assert torch.allclose(attention(x)[0], attention.out(torch.stack(rows)), atol=1e-12)
    mask = torch.tensor([True, True, False, False])[None, None, None]
    if not causal:
        assert torch.allclose(attention(x, mask)[:, :2], attention(x[:, :2]), atol=1e-12)


def test_merged_layers_compute_the_sums_of_their_parts() -> None:
    model = moved(WideEncoder(4, 2, d_model=12, d_head=4, d_ff=8))
    tokens = torch.randint(0, 256, (2, 7))
    wide = merge_layers(model, (1, 2), example=tokens)
    assert [layer.attn.num_heads for layer in wide.layers] == [2, 4, 2]  # type: ignore[union-attr]
    x = torch.randn(2, 7, 12).double()
    narrow = [model.layers[i] for i in (1, 2)]  # type: ignore[index]
    with torch.no_grad():
        u = x + sum(layer.attn(layer.norm1(x)) for layer in narrow)
        expected = u + sum(layer.mlp(layer.norm2(u)) for layer in narrow)
        assert torch.allclose(wide.layers[1](x), expected, atol=1e-12)  # type: ignore[index]
        assert not torch.allclose(wide(tokens), model(tokens), atol=1e-3)
    with pytest.raises(BadInput, match="no softmax attention"):
        merge_layers(WideEncoder(2, 2, attention="linear"), example=tokens)
    with pytest.raises(BadInput, match="no pre-norm"):
        merge_layers(ResidualNet(widths=(4,), depth=3), example=torch.zeros(1, 1, 8, 8))
    with pytest.raises(BadInput, match="nowhere"):
        merge_layers(VisionTransformer(d_model=8, num_heads=2), example=torch.zeros(1, 1, 8, 8), name="nowhere")
    with pytest.raises(BadInput, match="spans"):
        merge_layers(model, (3, 2), example=tokens)


def test_a_comparison_reports_every_member() -> None:
    tokens = torch.randint(0, 8, (16, 6), generator=torch.Generator().manual_seed(0))
    data = Split(tokens, tokens[:, 0] % 2)

    def score(out: Tensor, target: Tensor) -> Tensor:
        return (out.argmax(-1) == target).float()

    task = Task(nn.Identity(), data, data, data, F.cross_entropy, score)
    torch.manual_seed(0)
    family = aspect_ratio_family(2, d_model=8, d_head=4, d_ff=8, vocabulary=8, context=6)
    rows = compare_aspect(family, task, steps=40, lr=1e-2, batch_size=16, rounds=2)
    assert [(row.layers, row.heads) for row in rows] == [(2, 1), (1, 2)]
    assert rows[0].speedup == 1.0
    assert rows[1].parameters < rows[0].parameters
    assert all(row.latency > 0 and row.memory > 4 * row.parameters and 0 <= row.score <= 1 for row in rows)
    assert max(row.score for row in rows) > 0.6  # they were trained


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(BadInput, match="total_heads"):
        aspect_ratio_family(0)
    with pytest.raises(BadInput, match="'softmx'"):
        WideEncoder(1, 1, attention="softmx")
    with pytest.raises(BadInput, match="d_head must be at least 1, got 0"):
        WideEncoder(1, 1, d_head=0)
    with pytest.raises(BadInput, match="at least one encoder"):
        compare_aspect([], Task(nn.Identity(), *[Split(torch.ones(1), torch.ones(1))] * 3, F.mse_loss, F.mse_loss))
    for tokens in (torch.zeros(2, 5), torch.zeros(5, dtype=torch.long), torch.zeros(1, 300, dtype=torch.long)):
        with pytest.raises(BadInput, match="tokens must be"):
            WideEncoder(1, 1)(tokens)
