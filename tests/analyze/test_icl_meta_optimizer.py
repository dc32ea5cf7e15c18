"""The dual of attention and gradient descent, the measures by hand, and what the comparison moves and reads."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau
from torch import Tensor
from torch.nn import functional as F

from torchgraft.analyze.incontext.icl_meta_optimizer import (
    Demonstrations,
    attention_dual,
    compare_icl_ft,
    gradient_dual,
    kendall,
    rec2ftp,
    sim_am,
    sim_aou,
)
from torchgraft.engines import taps
from torchgraft.engines.attention import attend, attention_weights, unnormalized
from torchgraft.errors import BadInput
from torchgraft.parts.blocks.sequence_model import SequenceModel
from torchgraft.parts.mixers.momentum_attention import MomentumAttention
from torchgraft.parts.mixers.softmax_attention import SoftmaxAttention

DOUBLE = torch.float64


def _weights(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return W_K (3, 5), W_V (4, 5), demonstrations (6, 5), context (2, 5) and a query (3,)."""
    draw = torch.Generator().manual_seed(seed)
    shapes = ((3, 5), (4, 5), (6, 5), (2, 5), (3,))
    w_k, w_v, demos, context, q = (torch.randn(shape, generator=draw, dtype=DOUBLE) for shape in shapes)
    return w_k, w_v, demos, context, q


@given(seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_linear_attention_is_an_update_of_weights(seed: int) -> None:
    w_k, w_v, demos, context, q = _weights(seed)
    tokens = torch.cat([demos, context])
    mixed = attend(
        q[None, None, None],
        (tokens @ w_k.T)[None, :, None],
        (tokens @ w_v.T)[None, :, None],
        normalize=unnormalized,
        scale=1.0,
    )[0, 0, 0]
    both = attention_dual(w_k, w_v, context) + attention_dual(w_k, w_v, demos)
    torch.testing.assert_close(mixed, both @ q, rtol=1e-10, atol=1e-10)


def test_a_step_of_gradient_descent_is_linear_attention() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(5, 3, bias=False).double()
    x, y, q = torch.randn(6, 5, dtype=DOUBLE), torch.randn(6, 3, dtype=DOUBLE), torch.randn(5, dtype=DOUBLE)
    before = layer.weight.detach().clone()
    errors = -0.1 * (layer(x) - y).detach()  # of half the squared error
    (0.5 * (layer(x) - y).square().sum()).backward()
    assert layer.weight.grad is not None
    with torch.no_grad():
        layer.weight -= 0.1 * layer.weight.grad
    torch.testing.assert_close(layer.weight.detach(), before + gradient_dual(errors, x), rtol=1e-10, atol=1e-10)
    attended = sum(error * (each @ q) for error, each in zip(errors, x, strict=True))
    torch.testing.assert_close(layer(q).detach(), before @ q + attended, rtol=1e-10, atol=1e-10)


def test_the_same_update_is_alike_and_its_opposite_is_not() -> None:
    w_k, w_v, demos, context, q = _weights()
    zero, update = attention_dual(w_k, w_v, context), attention_dual(w_k, w_v, demos)
    tokens = torch.cat([demos, context])
    in_context = attend(
        q[None, None, None],
        (tokens @ w_k.T)[None, :, None],
        (tokens @ w_v.T)[None, :, None],
        normalize=unnormalized,
        scale=1.0,
    )[0, 0, 0]
    assert sim_aou(in_context, zero @ q, (zero + update) @ q).item() == pytest.approx(1.0, abs=1e-10)
    small = 1e-6 * update  # directions turn with large steps: lengths are taken out
    for sign in (1, -1):
        found = sim_aou((zero + small) @ q, zero @ q, (zero + sign * small) @ q)
        assert found.item() == pytest.approx(sign, abs=1e-4)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_measures_stay_in_their_range_and_rank_correlation_is_scipys(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    a, b, c = (torch.randn(3, 7, generator=draw, dtype=DOUBLE) for _ in range(3))
    assert sim_aou(a, b, c).abs().max() <= 1 + 1e-12
    assert sim_am(a, b).abs().max() <= 1 + 1e-12
    c[:, 2] = c[:, 4]  # a tie
    found = kendall(a, c)
    for row in range(3):
        assert found[row].item() == pytest.approx(kendalltau(a[row].numpy(), c[row].numpy()).statistic)


def test_recall_of_corrected_answers_by_hand() -> None:
    zero = torch.tensor([True, False, False, False, False])
    icl = torch.tensor([True, True, False, True, True])
    ft = torch.tensor([True, True, True, True, False])
    assert rec2ftp(zero, icl, ft) == pytest.approx(2 / 3)
    assert math.isnan(rec2ftp(ft, icl, ft))


def _case(mixer: type = SoftmaxAttention) -> tuple[SequenceModel, Demonstrations, Tensor, Tensor]:
    torch.manual_seed(0)
    model = SequenceModel(8, 2, mixer, vocab_size=12)
    for block in model.blocks:  # weights of a size that a step can be told from rounding
        torch.nn.init.normal_(block.mixer.qkv.weight)
    demos = Demonstrations(torch.randint(8, (5, 3)), torch.randint(8, 12, (5, 1)), torch.randint(8, 12, (5,)))
    return model.double(), demos, torch.randint(8, (6, 3)), torch.randint(8, 12, (6,))


def test_finetuning_moves_keys_and_values_in_a_copy() -> None:
    """One demonstration, by hand: the rows of queries stay, the others take one step; the model is left alone."""
    model, demos, queries, targets = _case()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    one = Demonstrations(demos.prompts[:1], demos.answers[:1], demos.labels[:1])
    found = compare_icl_ft(model, one, queries, targets, lr=0.5)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert all(value.requires_grad and value.grad is None for value in model.parameters())
    F.cross_entropy(model(one.prompts)[:, -1], one.labels).backward()
    with torch.no_grad():
        zero = model(queries)[:, -1].argmax(-1)
        with taps.record(model, "*mixer") as before:
            model(queries)
        for block in model.blocks:
            assert block.mixer.qkv.weight.grad is not None
            block.mixer.qkv.weight[8:] -= 0.5 * block.mixer.qkv.weight.grad[8:]
        with taps.record(model, "*mixer") as after:
            tuned = model(queries)[:, -1].argmax(-1)
        model.load_state_dict(kept)
        with taps.record(model, "*mixer") as shown:
            model(torch.cat([one.context().expand(6, -1), queries], 1))
    assert found.accuracy["zero-shot"] == pytest.approx(float((zero == targets).double().mean()))
    assert found.accuracy["finetuned"] == pytest.approx(float((tuned == targets).double().mean()))
    for name in ("blocks.0.mixer", "blocks.1.mixer"):
        wanted = sim_aou(shown[name][:, -1], before[name][:, -1], after[name][:, -1]).mean()
        assert found.sim_aou[name] == pytest.approx(float(wanted), abs=1e-9)


def test_scores_are_those_of_the_attention() -> None:
    """In the first layer, the maps before finetuning follow from its queries and keys; MomentumAttention gives them."""
    model, demos, queries, targets = _case(lambda width: MomentumAttention(width, num_heads=2, num_kv_heads=1))
    found = compare_icl_ft(model, demos, queries, targets, lr=1e-12, attention="blocks.0.mixer")
    assert list(found.sim_am) == ["blocks.0.mixer"]
    block = model.blocks[0]
    scores = []
    for tokens in (queries, torch.cat([demos.context().expand(6, -1), queries], 1)):
        with taps.record(model, "blocks.0.mixer", "input") as seen, torch.no_grad():
            model(tokens)
            q, k, _ = block.mixer.heads(seen["blocks.0.mixer"], 0)
        scores.append(attention_weights(q, k, normalize=unnormalized)[:, :, -1])
    wanted = float(sim_am(scores[0], scores[1][..., -3:]).mean())
    assert found.sim_am_before["blocks.0.mixer"] == pytest.approx(wanted, abs=1e-9)
    assert found.sim_am["blocks.0.mixer"] == pytest.approx(wanted, abs=1e-6)  # the step is of no size
    assert wanted == pytest.approx(1.0, abs=1e-9)  # rotary scores of the first layer depend on distances only


def test_controls_are_drawn_from_the_seed_and_modes_come_back() -> None:
    model, demos, queries, targets = _case()
    model.train()
    runs = [compare_icl_ft(model, demos, queries, targets, lr=0.1, seed=seed) for seed in (0, 0, 1)]
    assert runs[0].sim_aou_random == runs[1].sim_aou_random
    assert runs[0].sim_aou_random != runs[2].sim_aou_random
    assert runs[0].sim_aou == runs[2].sim_aou
    assert model.training
    for found in runs:
        measures = (found.sim_aou, found.sim_aou_random, found.sim_am, found.sim_am_before, found.kendall)
        assert all(abs(value) <= 1 + 1e-9 for measure in measures for value in measure.values())


def test_bad_input_is_refused() -> None:
    model, demos, queries, targets = _case()
    with pytest.raises(BadInput, match="lr must be positive"):
        compare_icl_ft(model, demos, queries, targets, lr=0.0)
    with pytest.raises(BadInput, match="queries must be prompts"):
        compare_icl_ft(model, demos, queries[:, :2], targets, lr=0.1)
    with pytest.raises(BadInput, match="qkv"):
        compare_icl_ft(model, demos, queries, targets, lr=0.1, attention="norm")
    with pytest.raises(BadInput, match="agree"):
        Demonstrations(demos.prompts, demos.answers[:2], demos.labels)
    with pytest.raises(BadInput, match="agree"):
        gradient_dual(torch.zeros(2, 3), torch.zeros(3, 3))
    with pytest.raises(BadInput, match="w_k"):
        attention_dual(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(5, 3))
