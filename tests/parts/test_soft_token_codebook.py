"""Soft tokens: limits, the gradient written out, the posterior mean, running means, masks, and the two loops."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchgraft.errors import BadInput
from torchgraft.parts.memories.soft_token_codebook import (
    SoftTokenDecoder,
    VQCodebook,
    mask_augment,
    soft_token,
    valid_loss,
)
from torchgraft.parts.memories.soft_token_head import UnifiedHead, VQTokenizer, dice_loss, map_tokenizer


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def decoder(seed: int = 0, **options: int) -> SoftTokenDecoder:
    torch.manual_seed(seed)
    settings_ = {"num_codes": 5, "tasks": 2, "length": 4, "layers": 2, "num_heads": 2, **options}
    return SoftTokenDecoder(8, **settings_).double().eval()


def test_limits_of_a_soft_token() -> None:
    logits, codes = draw(3, 4, 6), draw(6, 5, seed=2)
    hard = codes[logits.argmax(-1)]
    assert torch.equal(soft_token(logits, codes, tau=math.inf), hard)
    torch.testing.assert_close(soft_token(logits, codes, tau=1e5), hard, rtol=0, atol=1e-12)
    one_hot = torch.nn.functional.one_hot(logits.argmax(-1), 6).double() * 1e3
    torch.testing.assert_close(soft_token(one_hot, codes), hard, rtol=0, atol=1e-12)
    torch.testing.assert_close(soft_token(0 * logits, codes), codes.mean(0).expand(3, 4, 5), rtol=0, atol=1e-12)
    low = soft_token(torch.tensor([1.0, 0.0]).double(), torch.tensor([[1.0], [0.0]]).double())
    assert low.item() == pytest.approx(1 / (1 + math.exp(-0.8)), abs=1e-12)  # tau = 0.8 multiplies


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.floats(0.01, 50), st.integers(0, 99))
def test_a_soft_token_lies_in_the_hull_of_its_codes(n: int, size: int, tau: float, seed: int) -> None:
    logits, codes = 3 * draw(4, n, seed=seed), draw(n, size, seed=seed + 1)
    found, ways = soft_token(logits, codes, tau=tau), draw(size, 20, seed=seed + 2)
    assert bool((found @ ways <= (codes @ ways).max(0).values + 1e-9).all())  # no direction in which it sticks out


def test_gradient_is_the_formula() -> None:
    logits, codes, tau = draw(6), draw(6, 5, seed=2), 0.8
    found = torch.autograd.functional.jacobian(lambda u: soft_token(u, codes, tau=tau), logits)  # (D, N)
    w = (tau * logits).exp() / (tau * logits).exp().sum()
    expected = torch.zeros(5, 6, dtype=torch.float64)
    for i, j in itertools.product(range(6), range(6)):
        expected[:, i] += tau * ((w[i] if i == j else 0) - w[i] * w[j]) * codes[j]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert float(found.norm(dim=0).min()) > 1e-3  # every code gets credit, near or far
    assert torch.autograd.gradcheck(lambda u, e: soft_token(u, e, tau=tau), (logits[None].requires_grad_(), codes))


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 6), st.integers(1, 4), st.integers(0, 999))
def test_the_posterior_mean_beats_the_likeliest_token(n: int, size: int, seed: int) -> None:
    """All contexts and codes enumerated: joint probabilities, a linear decoder, expected squared errors summed."""
    joint = draw(3, n, seed=seed).mul(2).flatten().softmax(-1).unflatten(0, (3, n))  # p(context, code)
    codes, linear = draw(n, size, seed=seed + 1), draw(size, 2, seed=seed + 2)
    posterior = joint / joint.sum(1, keepdim=True)
    errors = {}
    for name, tau in (("soft", 1.0), ("hard", math.inf), ("half", 0.5)):
        said = soft_token(posterior.log(), codes, tau=tau) @ linear
        errors[name] = sum(
            float(joint[c, i]) * float((said[c] - codes[i] @ linear).square().sum()) for c in range(3) for i in range(n)
        )
    assert errors["soft"] <= errors["hard"] + 1e-12
    assert errors["soft"] <= errors["half"] + 1e-12


def test_codes_are_the_running_means_of_what_they_were_given() -> None:
    torch.manual_seed(0)
    book = VQCodebook(2, num_codes=3, ema=0.9).double().train()
    book.codes.copy_(torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 99.0]]))
    counts, sums = [0.0, 0.0], [torch.zeros(2).double(), torch.zeros(2).double()]
    for step in range(4):
        z = torch.cat([draw(1, 3, 2, seed=step), draw(1, 2, 2, seed=step + 9) + torch.tensor([10.0, 0.0])], 1)
        kept = book.codes.clone()
        quantized, tokens, loss = book(z)
        assert tokens.tolist() == [[0, 0, 0, 1, 1]]
        assert torch.equal(quantized, kept[tokens])
        torch.testing.assert_close(loss, 0.25 * (z - kept[tokens]).square().mean(), rtol=0, atol=1e-12)
        for code, rows in ((0, z[0, :3]), (1, z[0, 3:])):
            counts[code] = 0.9 * counts[code] + 0.1 * len(rows)
            sums[code] = 0.9 * sums[code] + 0.1 * rows.sum(0)
            torch.testing.assert_close(book.codes[code], sums[code] / counts[code], rtol=0, atol=1e-12)
        assert book.codes[2].tolist() == [0.0, 99.0]  # nobody came, nothing moved
    kept = book.codes.clone()
    book.eval()(z)
    assert torch.equal(book.codes, kept)
    assert list(book.parameters()) == []


def test_quantising_passes_the_gradient_and_pulls_the_encoder() -> None:
    book, z, upstream = (
        VQCodebook(3, num_codes=4).double().eval(),
        draw(2, 5, 3).requires_grad_(),
        draw(2, 5, 3, seed=2),
    )
    quantized, tokens, loss = book(z)
    assert torch.equal(torch.autograd.grad(quantized, z, upstream)[0], upstream)
    expected = 0.25 * 2 * (z.detach() - book.codes[tokens]) / z.numel()
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0], expected, rtol=0, atol=1e-12)


def test_masked_loss_ignores_what_is_not_valid() -> None:
    found, target, valid = draw(2, 1, 4, 4), draw(2, 1, 4, 4, seed=2), draw(2, 1, 4, 4, seed=3) > 0
    kept = [(float(f) - float(t)) ** 2 for f, t, v in zip(found.view(-1), target.view(-1), valid.view(-1)) if v]  # noqa: B905
    assert float(valid_loss(found, target, valid)) == pytest.approx(sum(kept) / len(kept), abs=1e-12)
    spoilt = torch.where(valid, target, torch.nan)
    found.requires_grad_()
    torch.testing.assert_close(valid_loss(found, spoilt, valid), valid_loss(found, target, valid), rtol=0, atol=0)
    gradient = torch.autograd.grad(valid_loss(found, spoilt, valid), found)[0]
    assert bool((gradient[~valid] == 0).all())
    assert bool((gradient[valid] != 0).all())
    assert float(valid_loss(found, target, valid & False).detach()) == 0.0


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.floats(0, 1), st.integers(0, 99))
def test_mask_hides_whole_patches_and_the_right_share(p: int, rows: int, columns: int, ratio: float, seed: int) -> None:
    target = draw(3, 2, p * rows, p * columns, seed=seed).abs() + 1
    found = mask_augment(target, patch=p, ratio=ratio, generator=torch.Generator().manual_seed(seed))
    cells = (found == 0).unfold(2, p, p).unfold(3, p, p).flatten(4)  # (B, C, rows, columns, p * p)
    assert bool((cells.all(-1) == cells.any(-1)).all())
    assert bool((cells[:, 0] == cells[:, 1]).all())
    assert cells[:, 0, :, :, 0].flatten(1).sum(1).tolist() == [math.ceil(ratio * rows * columns)] * 3
    assert torch.equal(found[found != 0], target[found != 0])


def test_the_loop_fed_hard_tokens_equals_the_pass_that_knows_them() -> None:
    model, features = decoder(), draw(3, 6, 8)
    with torch.no_grad():
        for task in (0, 1):
            hard = model(features, task=task, soft=False)
            torch.testing.assert_close(model.teach(features, hard.argmax(-1), task=task), hard, rtol=0, atol=1e-12)
            soft = model(features, task=task)
            torch.testing.assert_close(soft[:, 0], hard[:, 0], rtol=0, atol=1e-12)
            assert float((soft[:, 1:] - hard[:, 1:]).abs().max()) > 1e-3
        model.head.weight.mul_(1e4)  # certain of every token, soft is hard
        torch.testing.assert_close(model(features), model(features, soft=False), rtol=1e-9, atol=1e-9)


def test_the_second_step_reads_the_mixture_of_embeddings() -> None:
    model, features = decoder(length=2), draw(1, 6, 8)
    with torch.no_grad():
        logits = model(features, task=1)
        mixture = logits[0, 0].softmax(-1) @ model.embed[1]
        x = torch.stack([model.start[1], mixture])[None] + model.position
        for layer in model.layers:
            x = layer(x, features, tgt_mask=torch.tensor([[False, True], [False, False]]))
        said = (model.norm(x) @ model.head.weight.T + model.head.bias)[0, 1, 5:]
    torch.testing.assert_close(logits[0, 1], said, rtol=0, atol=1e-12)


def test_tasks_do_not_leak() -> None:
    model, features = decoder(), draw(3, 6, 8)
    with torch.no_grad():
        before = model(features, task=0)
        model.embed[1] += 7
        model.start[1] += 7
        model.head.weight[5:] += 7
        model.head.bias[5:] += 7
        assert torch.equal(model(features, task=0), before)
        assert not torch.equal(model(features, task=1), before)


def head(soft: bool = True) -> UnifiedHead:
    torch.manual_seed(0)
    tokenizers = {name: map_tokenizer(1, 4, num_codes=5, width=4, dim=3, patch=4) for name in ("depth", "mask")}
    return UnifiedHead(decoder(), tokenizers, size=(2, 2), soft=soft).double()


def test_unified_head_says_maps_of_its_tasks() -> None:
    model, features, labels = head(), draw(2, 6, 8), draw(2, 1, 8, 8).abs() + 0.1
    for number, (name, tokenizer) in enumerate(model.tokenizers.items()):
        logits = model.decoder(features, task=number)
        expected = tokenizer.decode(soft_token(logits, tokenizer.book.codes), (2, 2))
        assert torch.equal(model(features, name), expected)
        assert expected.shape == labels.shape
        tokens = tokenizer.tokens(labels)
        logits = model.decoder.teach(features, tokens, task=number)
        entropy = -logits.log_softmax(-1).gather(-1, tokens[..., None]).mean()
        said = tokenizer.decode(soft_token(logits, tokenizer.book.codes), (2, 2))
        total = entropy + 3.0 * (said - labels).square().mean()
        torch.testing.assert_close(model.loss(features, labels, name, output_weight=3.0), total)
        torch.testing.assert_close(model.loss(features, labels, name, output_weight=0.0), entropy)
    hard = head(soft=False)
    tokens = hard.decoder(features, task=1, soft=False).argmax(-1)
    tokenizer = hard.tokenizers["mask"]
    assert torch.equal(hard(features, "mask"), tokenizer.decode(tokenizer.book.codes[tokens], (2, 2)))


def test_unified_head_freezes_its_tokenizers() -> None:
    model, features, labels = head(), draw(2, 6, 8), draw(2, 1, 8, 8).abs()
    codes = model.tokenizers["depth"].book.codes.clone()
    model.train()
    model.loss(features, labels, "depth").backward()
    assert torch.equal(model.tokenizers["depth"].book.codes, codes)
    moved = {name.split(".")[0] for name, value in model.named_parameters() if value.grad is not None}
    assert moved == {"decoder"}
    assert model.decoder.training
    assert not model.tokenizers.training


def test_tokenizer_sees_less_than_it_is_asked_for() -> None:
    torch.manual_seed(0)
    tokenizer = map_tokenizer(1, 4, num_codes=6, width=4, dim=3, patch=4, ratio=0.0).double().eval()
    labels = draw(2, 1, 8, 8).abs() + 0.1
    valid = draw(2, 1, 8, 8, seed=4) > -0.5
    given = torch.where(valid, labels, 0)
    z = tokenizer.encoder(given).flatten(2).mT
    expected = valid_loss(tokenizer(given), labels, valid) + tokenizer.book(z)[2]
    torch.testing.assert_close(tokenizer.loss(labels, valid), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(tokenizer.loss(given), expected, rtol=0, atol=1e-12)  # 0 says undefined by itself
    spoilt = torch.where(valid, labels, torch.nan)
    torch.testing.assert_close(tokenizer.loss(spoilt, valid), expected, rtol=0, atol=1e-12)
    tokenizer.ratio = 0.5
    masked = tokenizer.loss(labels, valid, generator=torch.Generator().manual_seed(3))
    shown = mask_augment(given, patch=4, generator=torch.Generator().manual_seed(3))
    z = tokenizer.encoder(shown).flatten(2).mT
    expected = valid_loss(tokenizer(shown), labels, valid) + tokenizer.book(z)[2]
    torch.testing.assert_close(masked, expected, rtol=0, atol=1e-12)


def test_dice_by_hand() -> None:
    found, target = torch.tensor([[[[1.0, 0.5], [0.0, 1.0]]]]), torch.tensor([[[[1.0, 1.0], [0.0, 0.0]]]])
    everywhere = torch.ones_like(found, dtype=torch.bool)
    expected = 1 - (2 * 1.5 + 1) / (2.5 + 2 + 1) + (0.25 + 1) / 4
    assert float(dice_loss(found, target, everywhere)) == pytest.approx(expected, abs=1e-6)
    assert float(dice_loss(target, target, everywhere)) == pytest.approx(0.0, abs=1e-6)


def test_bad_input() -> None:
    features = draw(2, 6, 8)
    tokenizer = map_tokenizer(1, 4, num_codes=5, dim=3)
    assert isinstance(tokenizer, VQTokenizer)
    for make, words in (
        (lambda: soft_token(draw(3, 4), draw(5, 2)), r"got \(3, 4\) and \(5, 2\)"),
        (lambda: soft_token(draw(5), draw(5, 2), tau=0.0), "tau must be above 0"),
        (lambda: mask_augment(draw(1, 1, 6, 8), patch=4), "in steps of patch 4"),
        (lambda: mask_augment(draw(1, 1, 8, 8), patch=4, ratio=1.5), "ratio must be in"),
        (lambda: VQCodebook(4, num_codes=8)(draw(2, 4)), "z must be floating point"),
        (lambda: VQCodebook(4, ema=1.0), "decay must be within"),
        (lambda: SoftTokenDecoder(8, num_heads=3), "num_heads must divide d_model 8"),
        (lambda: decoder()(features, task=2), "task must be within 0..1"),
        (lambda: decoder().teach(features, torch.zeros(2, 3, dtype=torch.long)), r"tokens must be \(2, 4\)"),
        (lambda: decoder().teach(features, torch.full((2, 4), 5)), "tokens must be within 0..4"),
        (lambda: map_tokenizer(1, 6), "cell must be a power of 2"),
        (lambda: UnifiedHead(decoder(), {"depth": tokenizer}, size=(2, 2)), "do not fit tokenizers of"),
        (lambda: head()(features, "dpth"), "did you mean 'depth'"),
    ):
        with pytest.raises(BadInput, match=words):
            make()
