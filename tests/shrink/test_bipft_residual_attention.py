"""Binary attention: the residual polynomial is exact where its factors are, absent where they are zero, and counted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from torchgraft.bench.models import Attention, VisionTransformer
from torchgraft.engines.binary import sign
from torchgraft.engines.binary.elastic import BinaryProjection, ElasticSign, ElasticUnit, elastic_sign, elastic_unit
from torchgraft.errors import BadInput
from torchgraft.shrink.quantize.bipft_residual_attention import (
    BinaryAttention,
    BinaryTransformer,
    binarize,
    bit_operations,
    mask_tokens,
    masked_lm_loss,
)


def attention(rank: int, *, zero: bool = False, causal: bool = False) -> BinaryAttention:
    torch.manual_seed(0)
    made = BinaryAttention(8, num_heads=2, rank=4, causal=causal).double().eval()
    if rank != 4:
        torch.manual_seed(0)
        made = BinaryAttention(8, num_heads=2, rank=rank, causal=causal).double().eval()
    for layer in made.estimators.values():
        for value in layer.parameters():
            value.data = torch.zeros_like(value) if zero else 0.3 * torch.randn_like(value)
    return made


def test_four_terms_of_exact_residuals_are_the_full_product() -> None:
    torch.manual_seed(0)
    for alpha in (0.3, 1.0):
        q, k = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 5, 8, dtype=torch.float64)
        q_b, k_b = alpha * sign(q), alpha * sign(k)
        made = BinaryAttention(8, num_heads=1, rank=8).double()
        found = {"query_minor": q_b, "query_plus": q - q_b, "key_minor": k_b, "key_plus": k - k_b}
        for name, value in found.items():
            made.estimators[name] = Constant(value)
        assert torch.allclose(q_b @ k_b.mT + made.residual(q), q @ k.mT, atol=1e-5)


class Constant(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return self.value


def test_estimators_of_zero_give_the_plain_binary_attention() -> None:
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    plain, other = attention(0), attention(2, zero=True)
    other.load_state_dict({**other.state_dict(), **plain.state_dict()})
    assert torch.equal(other(x), plain(x))
    moved = attention(2)
    moved.load_state_dict({**moved.state_dict(), **plain.state_dict()})
    assert (moved(x) - plain(x)).abs().max() > 1e-3


def test_a_new_attention_starts_plain_and_all_its_estimators_learn() -> None:
    torch.manual_seed(0)
    made = BinaryAttention(8, num_heads=2, rank=2)
    assert made.residual(torch.randn(1, 3, 8)).abs().max() == 0
    optimizer = torch.optim.Adam(made.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        made(torch.randn(4, 6, 8)).square().sum().backward()
        optimizer.step()
    for name, value in made.estimators.named_parameters():
        assert value.grad is not None
        assert bool(value.grad.any()), name


def test_estimators_add_five_columns_of_parameters() -> None:
    def count(module: nn.Module) -> int:
        return sum(value.numel() for value in module.parameters())

    for rank in (1, 2, 4):
        assert count(attention(rank)) - count(attention(0)) == 5 * 9 * rank


@pytest.mark.parametrize("causal", [False, True])
def test_scores_and_context_by_hand(causal: bool) -> None:
    made = attention(2, causal=causal)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    seen: dict[str, Tensor] = {}
    for name in ("query_sign", "key_sign", "value_sign", "probability"):
        made.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: seen.update({name: out, f"{name} in": args[0]})
        )
    made.out = nn.Identity()
    found = made(x)
    for name in ("query_sign", "key_sign", "value_sign", "probability"):
        assert len(seen[name].detach().unique()) == 2, name
    assert seen["probability"].min() == 0
    minor_q, plus_q, minor_k, plus_k, plus_v = (layer(x) for layer in made.estimators.values())
    mixed = []
    for head in range(2):
        own = slice(4 * head, 4 * head + 4)
        q, k, v = (seen[name][..., own] for name in ("query_sign", "key_sign", "value_sign"))
        scores = q @ k.mT + minor_q @ plus_k.mT + plus_q @ minor_k.mT + plus_q @ plus_k.mT
        scores = scores / 2
        if causal:
            scores = scores + torch.full((5, 5), float("-inf"), dtype=torch.float64).triu(1)
        assert torch.allclose(scores.softmax(-1), seen["probability in"][:, head])
        p = seen["probability"][:, head]
        mixed.append(p @ v + p @ torch.stack([plus_v[..., 0], plus_v[..., 0], plus_v[..., 1], plus_v[..., 1]], -1))
    assert torch.allclose(found, torch.cat(mixed, -1))


@pytest.mark.parametrize("signed", [True, False])
def test_the_gradients_of_an_elastic_binariser_by_hand(signed: bool) -> None:
    x = torch.tensor([-1.2, -0.3, 0.0, 0.1, 0.3, 0.5, 0.9], dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    upstream = torch.tensor([2.0, 3.0, 5.0, 7.0, 11.0, 13.0, 17.0], dtype=torch.float64)
    out = elastic_sign(x, alpha) if signed else elastic_unit(x, alpha)
    bits = [-1.0, -1.0, 1.0, 1.0, 1.0, 1.0, 1.0] if signed else [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    assert out.tolist() == [0.5 * bit for bit in bits]
    to_x, to_alpha = torch.autograd.grad(out, (x, alpha), upstream)
    if signed:  # |x / alpha| <= 1; the sign
        assert to_x.tolist() == [0.0, 3.0, 5.0, 7.0, 11.0, 13.0, 0.0]
        expected = -2 - 3 + 5 + 7 + 11 + 13 + 17.0
    else:  # 0 <= x / alpha <= 1; round(x / alpha) - x / alpha inside, 0 below and 1 above
        assert to_x.tolist() == [0.0, 0.0, 5.0, 7.0, 11.0, 13.0, 0.0]
        expected = 7 * (0 - 0.2) + 11 * (1 - 0.6) + 13 * (1 - 1.0) + 17.0
    assert to_alpha.item() == pytest.approx(expected / 7**0.5)


def test_a_step_starts_at_twice_the_mean_magnitude_of_the_first_batch_in_training() -> None:
    for made in (ElasticSign().double(), ElasticUnit().double()):
        x = torch.rand(40, dtype=torch.float64)
        made.eval()(x)
        assert made.alpha.item() == 1.0
        made.train()(x)
        made(100 * x)
        assert made.alpha.item() == pytest.approx(2 * x.abs().mean().item())


def test_a_projection_has_two_weights_and_a_straight_gradient() -> None:
    torch.manual_seed(0)
    layer = BinaryProjection(6, 4, quantise=False).double()
    with torch.no_grad():
        layer.weight.add_(0.1)  # signs are those of W - mean W
    x, upstream = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    w = layer.weight.detach()
    expected = w.abs().mean() * sign(w - w.mean())
    assert torch.allclose(layer.binary_weight().detach(), expected)
    (layer(x) * upstream).sum().backward()
    assert layer.weight.grad is not None
    assert torch.allclose(layer.weight.grad, upstream.T @ x)  # that of the weight computed with, however large W is


def test_a_mask_hides_keys_as_in_full_precision() -> None:
    made = attention(1)
    x, other = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 5, 8, dtype=torch.float64)
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])[:, None, None]
    other[:, :3] = x[:, :3]
    assert torch.equal(made(x, mask)[1, :3], made(other, mask)[1, :3])
    assert not torch.equal(made(x, mask)[0, :3], made(other, mask)[0, :3])


def test_a_transformer_takes_over_weights_and_keeps_the_rest() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(d_model=16, depth=2, num_heads=2).eval()
    made = binarize(model, pretrain=False)
    x = torch.randn(3, 1, 8, 8)
    assert made(x).shape == (3, 10)
    assert not any(isinstance(module, Attention) for module in made.modules())
    block = made.blocks[0]
    assert isinstance(block.attn, BinaryAttention)
    assert isinstance(block.mlp.fc1, BinaryProjection)
    assert torch.equal(block.attn.key.weight, model.blocks[0].attn.key.weight)
    assert torch.equal(block.mlp.fc2.bias, model.blocks[0].mlp.fc2.bias)
    assert type(made.head) is nn.Linear
    assert type(made.patch) is nn.Conv2d
    assert not made.training

    def gap(student: nn.Module) -> float:
        with torch.no_grad():
            return float((student.eval()(x) - model(x)).square().mean())

    trained = binarize(model, x, steps=20, batch_size=3, lr=3e-3)
    assert gap(trained) < gap(made)
    again = binarize(model, x, steps=20, batch_size=3, lr=3e-3)
    assert torch.equal(again(x), trained(x))


def test_masked_language_modelling_hides_and_asks() -> None:
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 9, (200, 40), generator=draw)
    seen, hidden = mask_tokens(tokens, 9, generator=draw)
    assert bool((seen[hidden] == 9).all())
    assert torch.equal(seen[~hidden], tokens[~hidden])
    assert 0.14 < hidden.float().mean() < 0.17
    _, few = mask_tokens(tokens, 9, share=0.0, generator=draw)
    assert few.sum(1).tolist() == [1] * 200
    model = BinaryTransformer(10, 40, d_model=8, depth=1)
    expected = -model(seen).log_softmax(-1)[hidden].gather(1, tokens[hidden][:, None]).mean()
    assert torch.allclose(masked_lm_loss(model.eval(), tokens, hidden, seen), expected, atol=1e-5)
    classifier = model.classifier(6)
    assert classifier(tokens).shape == (200, 6)
    assert torch.equal(classifier.blocks[0].fc1.weight, model.blocks[0].fc1.weight)


def test_operations_by_hand() -> None:
    found = bit_operations(64, 32, num_heads=4, rank=1)
    assert found.binary == found.full == 32 * 12 * 64**2 + 2 * 32**2 * 64
    assert found.floating == 5 * 32 * 64 + 3 * 32**2 + 4 * 32**2  # scores for all heads; values for each
    assert found.saving == pytest.approx(found.full / (found.floating + found.binary / 64))
    assert bit_operations(64, 32, rank=0).saving == 64


def test_what_cannot_be_is_refused() -> None:
    cut = Attention(8, 2)
    cut.head_dim = 3
    for wrong in (
        lambda: BinaryAttention(8, num_heads=3),
        lambda: BinaryAttention(8, rank=3),
        lambda: BinaryAttention.from_attention(cut),
        lambda: binarize(nn.Linear(2, 2), pretrain=False),
        lambda: binarize(VisionTransformer(d_model=8, depth=1, num_heads=2)),
        lambda: BinaryAttention(8)(torch.zeros(2, 3, 9)),
    ):
        with pytest.raises(BadInput):
            wrong()
