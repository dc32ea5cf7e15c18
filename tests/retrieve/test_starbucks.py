"""The loss on a fixed menu of sizes, and masked pre-training of its sizes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.models import TextEncoder, VisionTransformer
from torchgraft.bench.task import Task
from torchgraft.engines.nesting.embed import ElasticEmbedder, in_batch_contrast
from torchgraft.engines.nesting.exit_models import ExitElastic
from torchgraft.engines.nesting.exits import exits
from torchgraft.engines.nesting.nested import Nested
from torchgraft.errors import BadInput
from torchgraft.retrieve.starbucks import MaskedAutoencoder, Starbucks, StarbucksLoss, smae_pretrain, spaced

SIZES = ((1, 2), (2, 4), (4, 8))


def _views(seed: int = 0) -> dict[int, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {layer: torch.randn(5, 8, generator=draw, dtype=torch.float64) for layer in range(1, 5)}


def test_one_pair_is_the_base_loss() -> None:
    a, b = _views(), _views(1)
    assert torch.equal(StarbucksLoss(in_batch_contrast, [(4, 8)])(a, b), in_batch_contrast(a[4], b[4]))


def test_without_divergence_the_loss_is_the_sum_of_the_truncated_losses() -> None:
    a, b = _views(), _views(1)
    parts = [float(in_batch_contrast(a[layer][:, :dim], b[layer][:, :dim])) for layer, dim in SIZES]
    assert float(StarbucksLoss(in_batch_contrast, SIZES, kl_weight=0.0)(a, b)) == pytest.approx(sum(parts), abs=1e-12)


def test_the_divergence_by_hand_and_the_same_twice() -> None:
    a = _views()
    loss = StarbucksLoss(lambda x: x.sum() * 0, SIZES, kl_weight=2.0)

    def divergence(layer: int, dim: int) -> float:
        p, q = torch.softmax(a[4][:, :dim], -1), torch.softmax(a[layer][:, :dim], -1)
        return float((p * (p / q).log()).sum(-1).mean())

    assert float(loss(a)) == pytest.approx(0.6 * (divergence(1, 2) + divergence(2, 4)), abs=1e-12)
    assert torch.equal(loss(a), loss(a))
    same = dict.fromkeys(a, a[4])
    assert float(loss(same)) == pytest.approx(0.0, abs=1e-12)
    assert loss.nearest(3) == (2, 4)
    assert loss.layers == (1, 2, 4)


def test_the_divergence_is_the_mean_over_both_sides() -> None:
    a, b = _views(), _views(1)
    loss = StarbucksLoss(lambda x, y: (x * y).sum() * 0, SIZES)
    alone = StarbucksLoss(lambda x: x.sum() * 0, SIZES)
    assert float(loss(a, b)) == pytest.approx((float(alone(a)) + float(alone(b))) / 2, abs=1e-12)
    assert abs(float(alone(a)) - float(alone(b))) > 1e-3


def test_the_teacher_is_detached_only_where_asked() -> None:
    for detach in (False, True):
        views = {layer: value.requires_grad_(True) for layer, value in _views().items()}
        StarbucksLoss(lambda x: x.sum() * 0, SIZES, detach=detach)(views).backward()
        assert bool(views[4].grad.any()) is not detach
        assert bool(views[1].grad.any())


def _autoencoder() -> tuple[MaskedAutoencoder, Tensor]:
    torch.manual_seed(0)
    encoder = TextEncoder(nn.Embedding(17, 8), 6, depth=4, num_heads=2)
    tokens = torch.randint(1, 17, (6, 6))
    tokens[0, 3:] = 0
    embedder = ElasticEmbedder(encoder, tokens)
    return MaskedAutoencoder(embedder, encoder.embed, encoder.norm, SIZES, context=6, num_heads=2).double(), tokens


def test_the_truncated_head_is_the_whole_head_on_padded_states() -> None:
    model, _ = _autoencoder()
    state = torch.randn(3, 4, dtype=torch.float64)
    padded = F.pad(state, (0, 4))
    whole = model.head_norm(F.gelu(model.dense(padded)))
    assert torch.allclose(model.transform(state), whole, atol=1e-12)


def test_masks_cover_real_tokens_at_their_rates() -> None:
    model, tokens = _autoencoder()
    many = tokens.repeat(300, 1)
    masks = model.draw(many, torch.Generator().manual_seed(0))
    for mask, rate in ((masks.encoder, 0.2), (masks.decoder, 0.4)):
        assert not bool(mask[many == 0].any())
        assert bool(mask.any(1).all())
        # One token at least is masked in each text of six, so the share lies a little above the rate.
        assert rate < float(mask[many != 0].double().mean()) < rate + 0.12


def test_special_tokens_are_never_hidden() -> None:
    model, tokens = _autoencoder()
    model.special = (0, 3)
    masks = model.draw(tokens.clamp(max=4).repeat(50, 1), torch.Generator().manual_seed(0))
    for mask in (masks.encoder, masks.decoder):
        assert not bool(mask[tokens.clamp(max=4).repeat(50, 1) == 3].any())
        assert bool(mask.any())


def test_masked_tokens_are_hidden_and_only_they_are_predicted() -> None:
    model, tokens = _autoencoder()
    masks = model.draw(tokens, torch.Generator().manual_seed(0))
    with torch.no_grad():
        base = model.parts(tokens, masks)
        states, _ = model.states(tokens, masks.encoder)
        other = torch.where(masks.encoder, tokens % 16 + 1, tokens)
        hidden, _ = model.states(other, masks.encoder)
        assert all(torch.allclose(states[layer], hidden[layer], atol=1e-12) for layer in states)
        shown, _ = model.states(other, torch.zeros_like(masks.encoder))
        assert not torch.allclose(states[4], shown[4], atol=1e-3)
        for (layer, dim), (predicted, _) in zip(SIZES, base, strict=True):
            logits = model.logits(model.transform(states[layer][..., :dim]))
            by_hand = F.cross_entropy(logits[masks.encoder], tokens[masks.encoder])
            assert float(predicted) == pytest.approx(float(by_hand), abs=1e-12)
    assert not any(model.embedding._forward_hooks)


def test_the_decoder_reads_the_embedding() -> None:
    model, tokens = _autoencoder()
    masks = model.draw(tokens, torch.Generator().manual_seed(0))
    model.dense.weight.requires_grad_(False)
    rebuilt = torch.stack([part for _, part in model.parts(tokens, masks)]).sum()
    gradient = torch.autograd.grad(rebuilt, model.embedder.encoder.blocks[3].mlp.fc2.weight)[0]
    assert float(gradient.abs().max()) > 0


def test_pre_training_lowers_its_loss_and_moves_the_encoder_alone() -> None:
    torch.manual_seed(0)
    encoder = TextEncoder(nn.Embedding(9, 8), 5, depth=2, num_heads=2)
    tokens = torch.randint(1, 3, (32, 5))
    embedder = ElasticEmbedder(encoder, tokens[:2])
    before, names = copy.deepcopy(encoder.state_dict()), set(dict(encoder.named_modules()))
    sizes = [(1, 4), (2, 8)]
    losses = smae_pretrain(embedder, tokens, encoder.embed, encoder.norm, sizes, steps=30, num_heads=2, lr=1e-2)
    assert losses[-1] < losses[0] - 0.3
    assert set(dict(encoder.named_modules())) == names
    assert any(not torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_bad_menus_and_views_are_refused() -> None:
    for bad in ([], [(1, 4), (2, 4)], [(2, 2), (1, 4)], [(0, 2)]):
        with pytest.raises(BadInput, match="sizes"):
            StarbucksLoss(in_batch_contrast, bad)
    with pytest.raises(BadInput, match="kl_weight"):
        StarbucksLoss(in_batch_contrast, SIZES, kl_weight=-1.0)
    loss = StarbucksLoss(in_batch_contrast, SIZES)
    with pytest.raises(BadInput, match="layers"):
        loss({4: torch.ones(2, 8)}, {4: torch.ones(2, 8)})
    with pytest.raises(BadInput, match="coordinates"):
        StarbucksLoss(in_batch_contrast, [(1, 2)])(_views(), _views())
    model, _ = _autoencoder()
    with pytest.raises(BadInput, match="rates"):
        MaskedAutoencoder(model.embedder, model.embedding, model.norm, SIZES, context=6, rates=(0.0, 0.5))


def _classifier() -> tuple[VisionTransformer, Task]:
    torch.manual_seed(0)
    model = VisionTransformer(8, 4, 1, 3, d_model=32, depth=4, num_heads=2).double()
    data = (torch.randn(6, 1, 8, 8, dtype=torch.float64), torch.randint(3, (6,)))
    return model, Task(model, data, data, data, F.cross_entropy, lambda out, target: out[:, 0], batch_size=6)


def _vector(model: VisionTransformer, images: Tensor, layers: int) -> Tensor:
    x = model.patch(images).flatten(2).transpose(1, 2)
    x = torch.cat([model.cls.expand(len(x), -1, -1), x], 1) + model.position
    for block in list(model.blocks)[:layers]:
        x = block(x)
    out: Tensor = model.norm(x[:, 0])
    return out


@pytest.mark.parametrize("detach", [False, True])
def test_the_loss_of_a_step_and_its_gradient_by_hand(detach: bool) -> None:
    model, task = _classifier()
    images, target = task.train.inputs, task.train.target
    assert isinstance(images, Tensor)
    objective = Starbucks(kl_weight=2.0, detach=detach).objective(exits(model, images), task, seed=0)
    loss = objective(Nested(model, [[]]), images, target, target)
    whole = _vector(model, images, 4)
    by_hand = F.cross_entropy(whole @ model.head.weight.T + model.head.bias, target)
    for layers, dim in ((2, 8), (3, 16)):
        small = _vector(model, images, layers)[:, :dim]
        p = torch.softmax((whole.detach() if detach else whole)[:, :dim], -1)
        q = torch.softmax(small, -1)
        by_hand = by_hand + F.cross_entropy(small @ model.head.weight[:, :dim].T + model.head.bias, target)
        by_hand = by_hand + 0.6 * (p * (p / q).log()).sum(-1).mean()
    assert float(loss.detach()) == pytest.approx(float(by_hand.detach()), abs=1e-12)
    first, second = (torch.autograd.grad(each, list(model.parameters())) for each in (loss, by_hand))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(first, second, strict=True))
    assert torch.equal(loss, objective(Nested(model, [[]]), images, target, target))


def test_sizes_halve_while_layers_are_spaced_evenly() -> None:
    assert spaced(4, 32) == ((2, 8), (3, 16), (4, 32))
    assert spaced(2, 96) == ((1, 48), (2, 96))
    assert spaced(3, 8) == ((3, 8),)
    assert Starbucks().menu(4, 32) == ((2, (8,)), (3, (16,)))
    assert Starbucks(sizes=((1, 4), (4, 32))).menu(4, 32) == ((1, (4,)),)


def test_the_budgets_are_the_menu_and_its_end_must_be_the_whole() -> None:
    model, task = _classifier()
    elastic = Starbucks(sizes=((1, 8), (3, 16), (4, 32))).build(model, task)
    assert isinstance(elastic, ExitElastic)
    images = task.train.inputs
    assert isinstance(images, Tensor)
    with torch.no_grad():
        for budget, (layers, dim) in zip(elastic.budgets, ((1, 8), (3, 16), (4, 32)), strict=True):
            wanted = _vector(model, images, layers)[:, :dim] @ model.head.weight[:, :dim].T + model.head.bias
            assert torch.allclose(elastic.set_budget(budget)(images), wanted, atol=1e-12)
    with pytest.raises(BadInput, match="dim"):
        elastic.keep(8)  # one of the budgets gives 16
    assert "whole encoder" in Starbucks(sizes=((1, 8), (2, 16))).refusals(model, task)[0].reason
    narrow = VisionTransformer(8, 4, 1, 3, d_model=8, depth=4, num_heads=2).double()
    assert "no smaller size" in Starbucks().refusals(narrow, task)[0].reason
    assert not Starbucks().applies_to(narrow, task)
    with pytest.raises(BadInput, match="sizes"):
        Starbucks(sizes=((2, 8), (1, 16)))
