"""FiRST: plans fixed by the prompt, decoding with a cache, the two phases."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from torchgraft.bench.meters import macs
from torchgraft.bench.models import VisionTransformer
from torchgraft.bench.task import Split, Task
from torchgraft.elastic.first_layer_routers import (
    LayerRouters,
    RoutedModel,
    add_layer_routers,
    fit_lora,
    fit_routers,
    generate,
    plan,
)
from torchgraft.errors import BadInput
from torchgraft.parts.blocks.sequence_model import SequenceModel
from torchgraft.parts.mixers.softmax_attention import SoftmaxAttention

_PROMPT = 4


def lm(layers: int = 4) -> tuple[SequenceModel, RoutedModel, Tensor]:
    torch.manual_seed(0)
    model = SequenceModel(16, layers, SoftmaxAttention, vocab_size=11).double().eval()
    tokens = torch.randint(11, (6, 9), generator=torch.Generator().manual_seed(1))
    made = add_layer_routers(model, tokens, prompt=_PROMPT, wanted=(0.5,), init_keep=False, rank=2)
    with torch.no_grad():
        for block in made.blocks:
            block.router.weight.normal_(generator=torch.Generator().manual_seed(2), std=1.0)
    return model, made, tokens


def task_of(model: torch.nn.Module, tokens: Tensor) -> Task:
    data = Split(tokens, tokens)
    loss = lambda out, target: F.cross_entropy(out.flatten(0, 1), target.flatten())  # noqa: E731
    return Task(model, data, data, data, loss, lambda out, t: (out.argmax(-1) == t).double().mean(1), batch_size=3)


def test_the_full_budget_is_the_original() -> None:
    model, made, tokens = lm()
    assert torch.equal(made(tokens), model(tokens))
    assert bool(plan(made, tokens).all())


def test_a_given_plan_equals_deleting_the_blocks() -> None:
    model, made, tokens = lm()
    fixed = torch.tensor([[True, False, True, False]]).expand(6, 4)
    found = generate(made.set_budget(0.5), tokens, max_new_tokens=3, fixed=fixed)  # type: ignore[arg-type]
    shorter = copy.deepcopy(model)
    shorter.blocks = torch.nn.ModuleList([shorter.blocks[0], shorter.blocks[2]])
    assert torch.equal(found.tokens, shorter.generate(tokens, max_new_tokens=3, temperature=0))


def test_plans_depend_on_the_prompt_alone() -> None:
    _, made, tokens = lm()
    made.set_budget(0.5)
    decided = plan(made, tokens[:, :_PROMPT])
    assert 0 < int(decided.sum()) < decided.numel()
    assert len(torch.unique(decided, dim=0)) > 1
    changed = tokens.clone()
    changed[:, _PROMPT:] = (changed[:, _PROMPT:] + 3) % 11
    assert torch.equal(plan(made, tokens), decided)
    assert torch.equal(plan(made, changed), decided)
    changed[:, 0] = (changed[:, 0] + 3) % 11
    assert not torch.equal(plan(made, changed), decided)


def test_decoding_with_a_cache_equals_reading_all_again() -> None:
    _, made, tokens = lm()
    made.set_budget(0.5)
    prompt = tokens[:, :_PROMPT]
    found = generate(made, prompt, max_new_tokens=5)
    again = prompt
    for _ in range(5):  # the plan stays, since only the first tokens decide
        again = torch.cat([again, made(again)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(found.tokens, again)
    assert torch.equal(found.plan, plan(made, prompt))


def test_skipped_blocks_cache_nothing() -> None:
    _, made, tokens = lm()
    made.set_budget(0.5)
    fixed = torch.tensor([[i < kept for i in range(4)] for kept in (0, 1, 2, 3, 4, 2)])
    found = generate(made, tokens[:, :_PROMPT], max_new_tokens=2, fixed=fixed)
    each = found.cache_bytes[1]
    assert int(each) > 0
    assert found.cache_bytes.tolist() == [int(each) * kept for kept in (0, 1, 2, 3, 4, 2)]


def test_phases_move_what_they_say_and_the_full_budget_stays() -> None:
    model, made, tokens = lm()
    task = task_of(model, tokens)
    expected = model(tokens)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    assert fit_routers(made, task, steps=2) == 2
    moved = {name for name, value in made.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all(".router." in name for name in moved)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    assert fit_lora(made, task, steps=2) == 2
    moved = {name for name, value in made.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all(name.endswith((".low", ".high", ".folded")) for name in moved)
    assert torch.equal(made(tokens), expected)
    assert all(value.requires_grad for value in made.parameters())


def test_strong_skipping_weight_lowers_the_gates() -> None:
    model, made, tokens = lm()
    made.set_budget(0.5)
    made(tokens)
    task = task_of(model, tokens)

    def mean_gate() -> float:
        h = model.embed(tokens)
        return float(torch.stack([block.scores(h).mean() for block in made.blocks]).mean().detach())

    before = mean_gate()
    fit_routers(made, task, steps=20, skip_weight=50.0, lr=0.05)
    assert mean_gate() < before - 0.2


def test_where_every_position_answers_few_tokens_decide() -> None:
    model, _, tokens = lm()
    [edit] = LayerRouters().plan(model, task_of(model, tokens))
    assert edit.prompt == 9 // 4  # type: ignore[attr-defined]


def test_bad_input_is_refused() -> None:
    model, made, tokens = lm()
    with pytest.raises(BadInput, match="layers"):
        add_layer_routers(model, tokens, layers=[7])
    with pytest.raises(BadInput, match="plans"):
        generate(made, tokens, max_new_tokens=1, fixed=torch.ones(6, 3))
    with pytest.raises(BadInput):
        LayerRouters(wanted=(0.8, 0.4))
    assert len(add_layer_routers(model, tokens, layers=[1, 2]).blocks) == 2


def test_budgets_are_declared_as_they_are_after_the_last_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(64, 1, 8, 8), torch.randint(0, 4, (64,))
    data = Split(x, y)
    net = VisionTransformer(8, 2, 1, 4, d_model=16, depth=4, num_heads=2).eval()
    task = Task(net, data, data, data, F.cross_entropy, lambda out, t: (out.argmax(-1) == t).double(), batch_size=16)
    procedure = LayerRouters(samples=64)
    elastic = procedure.build(net, task)
    assert isinstance(elastic, RoutedModel)
    with torch.no_grad():
        for block in elastic.blocks:
            block.router.weight.normal_(generator=torch.Generator().manual_seed(2), std=0.5)
    moved: list[float] = []

    def disturb(model: RoutedModel, *_: object, **__: object) -> int:
        before = [counted(model, budget) for budget in model.budgets]
        with torch.no_grad():  # as adapters do: what a later router reads is another hidden state
            for value in model.blocks[0].block.parameters():
                value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(3)))
        moved.extend(abs(counted(model, b) / c - 1) for b, c in zip(model.budgets, before, strict=True))
        return 1

    def counted(model: RoutedModel, budget: float) -> float:
        return macs(model.set_budget(budget), x) / macs(model.set_budget(1.0), x)

    monkeypatch.setattr("torchgraft.elastic.first_layer_routers.fit_lora", disturb)
    procedure.train(elastic, task, steps=2)
    assert max(moved) > 0.02  # decisions did change
    for budget in elastic.budgets:
        assert counted(elastic, budget) == pytest.approx(budget, rel=1e-6)
