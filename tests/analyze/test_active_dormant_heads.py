"""Active and dormant heads: the task's law, a circuit set by hand, and reports that equal what models say."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.analyze.circuits.active_dormant_heads import (
    BackcopyTransformer,
    BigramBackcopy,
    extreme_token_report,
    hand_built,
    head_dormancy,
)
from torchgraft.bench.models import ByteTransformer, mlp
from torchgraft.engines.attention_maps import attention_maps, without_heads
from torchgraft.engines.surgery.convert import convert
from torchgraft.errors import BadInput
from torchgraft.parts.blocks.sequence_model import SequenceModel
from torchgraft.parts.mixers.softmax_attention import SoftmaxAttention

TASK = BigramBackcopy(vocab=12, triggers=2, length=24)


def test_a_token_after_a_trigger_repeats_the_one_before_it() -> None:
    x = TASK.sample(400, seed=0)
    assert bool((x[:, 0] == 12).all())
    assert not bool(TASK.is_trigger(x[:, :2]).any())
    after = TASK.is_trigger(x[:, 1:-1])
    assert int(after.sum()) > 500
    assert torch.equal(x[:, 2:][after], x[:, :-2][after])
    # Two triggers never stand side by side, so that a copy is never a trigger.
    assert not bool((TASK.is_trigger(x[:, 1:]) & TASK.is_trigger(x[:, :-1])).any())
    assert torch.equal(x, TASK.sample(400, seed=0))
    assert not torch.equal(x, TASK.sample(400, seed=1))


def test_other_transitions_follow_the_bigram_law() -> None:
    x = TASK.sample(4000, seed=0)
    last, following = x[:, 1:-1].flatten(), x[:, 2:].flatten()
    free = ~TASK.is_trigger(last)
    counts = torch.bincount(last[free] * 12 + following[free], minlength=144).view(12, 12).double()[~TASK.triggers]
    law = TASK.law[~TASK.triggers]
    assert torch.allclose(law.sum(1), torch.ones(10).double())
    expected = law * counts.sum(1, keepdim=True)
    used = expected >= 5
    statistic = float((((counts - expected) ** 2 / expected)[used]).sum())
    freedom = int(used.sum()) - 10
    assert abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)
    # The same statistic tells another law from this one.
    other = TASK.law[~TASK.triggers].roll(1, 1) * counts.sum(1, keepdim=True)
    wrong = other >= 5
    assert float((((counts - other) ** 2 / other)[wrong]).sum()) > 10 * freedom


def loss_of(model: nn.Module, tokens: Tensor) -> float:
    split = TASK.split(tokens)
    with torch.no_grad():
        logits = model(split.inputs)
    return float(F.cross_entropy(logits.flatten(0, 1), split.target.flatten(), ignore_index=-100))


def test_the_circuit_set_by_hand_reaches_the_best_loss() -> None:
    model, tokens = hand_built(TASK), TASK.sample(3000, seed=2)
    split = TASK.split(tokens)
    assert isinstance(split.inputs, Tensor)
    asked = split.inputs[:, 1:]
    entropy = torch.cat([torch.special.entr(TASK.law).sum(1).masked_fill(TASK.triggers, 0.0), torch.zeros(1).double()])
    share = float(entropy[asked].mean())  # sum over non-triggers x of freq(x) H(P(.|x)), frequencies of this sample
    assert abs(TASK.best_loss() - share) < 0.01
    assert abs(loss_of(model, tokens) - TASK.best_loss()) < 0.01
    with torch.no_grad():
        each = F.cross_entropy(model(split.inputs).transpose(1, 2), split.target, reduction="none", ignore_index=-100)
    assert float(each[TASK.is_trigger(split.inputs)].max()) < 1e-6  # a trigger costs nothing
    spoilt = copy.deepcopy(model)
    with torch.no_grad():
        spoilt.blocks[0].attn.out.weight.zero_()  # type: ignore[union-attr, operator]
    assert loss_of(spoilt, tokens) > TASK.best_loss() + 0.3


def test_its_head_sleeps_on_the_start_symbol_and_wakes_on_triggers() -> None:
    model, tokens = hand_built(TASK), TASK.sample(64, seed=3)
    trigger = TASK.is_trigger(tokens)
    others = ~trigger
    others[:, 0] = False
    asleep = extreme_token_report(model, tokens, where=others)
    awake = extreme_token_report(model, tokens, where=trigger)
    assert asleep.sink.shape == (1, 1)
    assert float(asleep.sink) > 1 - 1e-6
    assert float(awake.sink) < 1e-6
    assert float(asleep.value) == 0.0
    split = TASK.split(tokens)
    assert isinstance(split.inputs, Tensor)
    wakes = TASK.is_trigger(split.inputs)
    domains = {
        "triggers": (split.inputs, split.target.masked_fill(~wakes, -100)),
        "others": (split.inputs, split.target.masked_fill(wakes, -100)),
    }
    rises = head_dormancy(model, domains)
    assert abs(float(rises["others"])) < 1e-12
    assert float(rises["triggers"]) > 1.0


def test_a_sink_without_value_can_be_ablated_bit_for_bit() -> None:
    torch.manual_seed(0)
    model = BackcopyTransformer(6, 8, d_model=8, layers=1, norm=False).double().eval()
    tokens = torch.tensor([[6, 1, 2, 3, 4, 5, 0]])
    with torch.no_grad():
        attn = model.blocks[0].attn  # all weight goes to token 0, whose value is zero
        model.embed.weight.zero_()
        model.position.zero_()
        model.embed.weight[6, 0] = 1.0
        model.embed.weight[:6, 1:] = torch.randn(6, 7).double()
        model.embed.weight[:, 1] = 1.0
        attn.query.weight.zero_()  # type: ignore[union-attr, operator]
        attn.key.weight.zero_()  # type: ignore[union-attr, operator]
        attn.query.weight[0, 1] = 1e4  # type: ignore[union-attr, index]
        attn.key.weight[0, 0] = 1e4  # type: ignore[union-attr, index]
        attn.value.weight[:, :2] = 0.0  # type: ignore[union-attr, index]
        with attention_maps(model) as seen:
            expected = model(tokens)
        with without_heads(model, {0: [0]}):
            found = model(tokens)
        assert bool((seen[0].weights[..., 0] == 1.0).all())
        assert not bool(seen[0].values[:, :, 0].any())
        assert bool(seen[0].values.any())
        assert torch.equal(found, expected)
        attn.value.weight[:, 0] = 1.0  # type: ignore[union-attr, index]
        with without_heads(model, {0: [0]}):
            found = model(tokens)
        assert not torch.equal(found, model(tokens))  # with a value of its own the sink is heard


def test_relu_attention_with_negative_scores_is_exactly_zero() -> None:
    torch.manual_seed(0)
    for kind in ("relu", "softmax"):
        attention = BackcopyTransformer(6, 8, d_model=8, attention=kind).blocks[0].attn
        x = torch.rand(2, 5, 8)
        with torch.no_grad():
            attention.query.weight.copy_(torch.eye(8))  # type: ignore[union-attr, operator]
            attention.key.weight.copy_(-torch.eye(8))  # type: ignore[union-attr, operator]
            with attention_maps(attention) as seen:  # type: ignore[arg-type]
                out = attention(x)  # type: ignore[operator]
        assert bool((out == 0).all()) == (kind == "relu")
        assert bool((seen[0].weights == 0).all()) == (kind == "relu")


def plain(q: Tensor, k: Tensor) -> Tensor:
    """Softmax of causal scores, (B, T, H, K) -> (B, H, T, T), written out."""
    scores = torch.einsum("bthk,bshk->bhts", q, k) / math.sqrt(q.shape[-1])
    return scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf).softmax(-1)


def test_maps_of_our_own_models_are_those_of_the_definition() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 16, (2, 7))
    model = ByteTransformer(16, 8, d_model=8, depth=3, num_heads=2).eval()
    with torch.no_grad(), attention_maps(model) as seen:
        model(tokens)
    x = model.embed(tokens) + model.position[:, :7]
    first = model.blocks[0]
    q, k, v = (part(first.norm1(x)).view(2, 7, 2, 4) for part in (first.attn.query, first.attn.key, first.attn.value))  # type: ignore[union-attr, operator]
    assert len(seen) == 3
    assert torch.allclose(seen[0].weights, plain(q, k), atol=1e-6)
    assert torch.allclose(seen[0].values, v.transpose(1, 2), atol=1e-6)
    report = extreme_token_report(model, tokens)
    assert torch.allclose(report.sink[0], plain(q, k)[:, :, 1:, 0].mean((0, 2)), atol=1e-6)
    norms = v.norm(dim=-1).transpose(1, 2)
    assert torch.allclose(report.value[0], (norms[..., 0] / norms[..., 1:].mean(-1)).mean(0), atol=1e-5)
    h = first(x).norm(dim=-1)
    assert torch.allclose(report.residual[0], (h[:, 0] / h[:, 1:].mean(1)).mean(), atol=1e-5)
    other = SequenceModel(16, 2, SoftmaxAttention).eval()
    assert extreme_token_report(other, tokens).sink.shape == (2, 4)
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
    ).eval()
    with pytest.raises(BadInput, match="keeps its heads"):
        extreme_token_report(encoder, torch.randn(2, 5, 8))
    assert extreme_token_report(convert(encoder), torch.randn(2, 5, 8)).sink.shape == (2, 2)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_models_of_transformers(family: str, implementation: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ids = torch.randint(0, 32, (2, 7))
    ends = {"bos_token_id": None, "eos_token_id": None, "attn_implementation": implementation}
    if family == "gpt2":
        config = transformers.GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=3, n_head=4, **ends)
        model = transformers.GPT2LMHeadModel(config).eval()
    else:
        sizes = {"intermediate_size": 32, "num_key_value_heads": 2, "num_hidden_layers": 3}
        config = transformers.LlamaConfig(vocab_size=32, hidden_size=16, num_attention_heads=4, **sizes, **ends)
        model = transformers.LlamaForCausalLM(config).eval()
    report = extreme_token_report(model, {"input_ids": ids})
    model.set_attn_implementation("eager")
    with torch.no_grad():
        told = model(input_ids=ids, output_attentions=True, output_hidden_states=True)
    for layer, weights in enumerate(told.attentions):
        assert torch.allclose(report.sink[layer], weights[:, :, 1:, 0].mean((0, 2)), atol=1e-5)
    for layer in (0, 1):  # the last hidden state that transformers tells is normalised
        norms = told.hidden_states[layer + 1].norm(dim=-1)
        assert torch.allclose(report.residual[layer], (norms[:, 0] / norms[:, 1:].mean(1)).mean(), atol=1e-4)
    assert report.value.shape == (3, 4)
    rises = head_dormancy(model, {"text": ({"input_ids": ids}, ids.roll(-1, 1))})["text"]
    assert rises.shape == (3, 4)
    assert bool(rises.any())


def test_nothing_is_left_behind_and_what_is_wrong_is_said() -> None:
    torch.manual_seed(0)
    model = ByteTransformer(16, 8, d_model=8, depth=2, num_heads=2).train()
    tokens = torch.randint(0, 16, (1, 6))
    before = model(tokens)
    extreme_token_report(model, tokens)
    assert model.training
    assert torch.equal(model(tokens), before)
    with pytest.raises(BadInput, match="heads 0 to 1"), without_heads(model, {1: [2]}):
        model(tokens)
    with pytest.raises(BadInput, match="shows no"):
        extreme_token_report(mlp(6, 2, widths=(4,)), torch.randn(2, 6))
    with pytest.raises(BadInput, match="shows no"):
        head_dormancy(mlp(6, 2, widths=(4,)), {"a": (torch.randn(2, 6), torch.tensor([0, 1]))})
    with pytest.raises(BadInput, match="sink must lie"):
        extreme_token_report(model, tokens, sink=5, where=torch.ones(1, 6, dtype=torch.bool))
    with pytest.raises(BadInput, match="where must choose"):
        extreme_token_report(model, tokens, where=torch.zeros(1, 6, dtype=torch.bool))
    with pytest.raises(BadInput, match="'sofmax'"):
        BackcopyTransformer(4, 4, attention="sofmax")
    with pytest.raises(BadInput, match="num_heads must divide"):
        BackcopyTransformer(4, 4, d_model=6, num_heads=4)
    for vocab, triggers, length in ((4, 4, 8), (91, 2, 8), (4, 1, 3)):
        with pytest.raises(BadInput):
            BigramBackcopy(vocab, triggers, length)
