"""Latent tokens beside a trained classifier: who leaves where, what runs behind it, what a budget costs, refusals."""

from __future__ import annotations

import copy
import itertools
import math
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.meters import macs
from torchgraft.bench.models import ResidualNet, VisionTransformer
from torchgraft.bench.task import Split, Task
from torchgraft.elastic.dynamic_perceiver import AddPerceiver, PerceiverBranch, PerceiverExits
from torchgraft.engines import recipe
from torchgraft.engines.nesting.branch_exits import BranchExits
from torchgraft.engines.surgery.edits import history
from torchgraft.errors import BadInput

_WANTED = (0.4, 0.6, 0.8)


def images(count: int = 60) -> Tensor:
    return torch.randn(count, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def task_of(model: nn.Module, x: Any, **options: Any) -> Task:
    count = len(x) if isinstance(x, Tensor) else len(x[0])
    data = Split(x, torch.arange(count) % 10)
    settings = {"batch_size": 16, "logits": None, **options}
    return Task(model, data, data, data, F.cross_entropy, lambda out, t: (out.argmax(-1) == t).float(), **settings)


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return ResidualNet(widths=(16, 32), depth=2).double().eval()


def toy(count: int = 60, **settings: Any) -> tuple[nn.Module, Task, BranchExits, Tensor]:
    big, x = classifier(), images(count)
    task = task_of(big, x)
    with torch.random.fork_rng():
        model = PerceiverExits(wanted=_WANTED, **settings).build(big, task)
        assert isinstance(model, BranchExits)
        torch.manual_seed(2)
        with torch.no_grad():  # tokens that say something of the image before they are trained
            for value in model.branch.parameters():
                value.add_(0.2 * torch.randn_like(value))
    model.set_thresholds(x, batch_size=16)
    return big, task, model, x


def at(model: BranchExits, level: int) -> BranchExits:
    model.set_budget(model.budgets[level])
    return model


def called(model: BranchExits) -> dict[str, list[int]]:
    """Return what will hold the number of samples of every call of a block of the original, or of the head."""
    seen: dict[str, list[int]] = {}
    for name, module in model.full.named_modules():
        if (name.startswith("blocks.") and name.count(".") == 1) or name in ("stem", "head"):
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.setdefault(name, []).append(len(args[0])),
            )
    return seen


def by_hand(model: BranchExits, x: Tensor, thresholds: list[float]) -> tuple[Tensor, Tensor]:
    """Return answers and exits, sample by sample and piece by piece."""
    net: Any = model.full
    branch: Any = model.branch
    answers, exits = [], []
    for each in x.split(1):
        hidden = F.relu(net.bn(net.stem(each)))
        z, y, number = None, None, 0
        for place, block in enumerate(net.blocks):
            hidden = block(hidden)
            if f"blocks.{place}" not in model.places:
                continue
            seen = hidden + branch.look[number](hidden)
            tokens = F.adaptive_avg_pool2d(seen, branch.pooled[number]).flatten(2).transpose(1, 2)
            z = branch.latents[None] if z is None else branch.onward[number - 1](z)
            z = branch.think[number](z + branch.read[number](z, tokens))
            mean = z.mean(1)
            y = branch.exits[number](mean if y is None else torch.cat([mean, branch.share[number - 1](y)], 1))
            if float(y.detach().softmax(1).max()) >= thresholds[number]:
                break
            number += 1
        else:
            y = net.head(hidden.mean((2, 3)))
        answers.append(y)
        exits.append(number)
    return torch.cat(answers), torch.tensor(exits)


def test_answers_are_those_of_exits_followed_by_hand() -> None:
    _, _, model, x = toy()
    met = set()
    for level in range(len(_WANTED)):
        answers, exits = by_hand(model, x, model.thresholds[level].tolist())
        torch.testing.assert_close(at(model, level)(x), answers, atol=1e-12, rtol=0)
        met.update(exits.tolist())
    assert met == {0, 1, 2, 3}


def test_at_zero_all_leave_at_the_first_exit_and_nothing_behind_it_runs() -> None:
    _, _, model, x = toy()
    model.thresholds.zero_()
    seen = called(model)
    out = at(model, 1)(x)
    assert model.places[0] == "blocks.0"
    assert seen == {"stem": [60], "blocks.0": [60]}
    assert torch.equal(out, model.exits(x)[:, 0])


def test_above_one_all_answers_are_the_originals_and_the_branch_does_not_run() -> None:
    big, _, model, x = toy()
    model.thresholds.fill_(1.0 + 1e-9)
    model.branch.register_forward_pre_hook(lambda *_: pytest.fail("the branch runs"))
    assert torch.equal(at(model, 0)(x), big(x))
    assert macs(model, x) == macs(big, x)


def test_blocks_see_the_samples_that_are_left_and_the_tokens_read_no_further_than_samples_leave() -> None:
    _, _, model, x = toy()
    sure = model.exits(x).detach().softmax(-1).amax(-1)
    one = float(sure[:, 0].sort().values[40])
    model.thresholds[0] = torch.tensor([one, 2.0, 2.0])
    seen, read = called(model), []
    model.branch.register_forward_pre_hook(lambda _, args: read.append((args[0], len(args[1]))))
    at(model, 0)(x)
    assert seen == {"stem": [60], "blocks.0": [60], **{f"blocks.{n}": [40] for n in (1, 2, 3)}, "head": [40]}
    assert read == [(0, 60)]


def test_the_full_budget_is_the_original_bit_for_bit_and_its_weights_never_move() -> None:
    big, task, model, x = toy()
    before = copy.deepcopy(model.full.state_dict())
    assert torch.equal(model(x), big(x))
    moved = model.branch.latents.clone()  # type: ignore[operator, union-attr]
    model.train()
    assert PerceiverExits(wanted=_WANTED).train(model, task, steps=8) == 8
    assert not torch.equal(moved, model.branch.latents)  # type: ignore[arg-type]
    assert torch.equal(model.set_budget(1.0)(x), big(x))
    for level in range(len(_WANTED)):
        at(model, level)(x)
    assert torch.equal(model.set_budget(1.0)(x), big(x))
    assert all(torch.equal(value, before[name]) for name, value in model.full.state_dict().items())
    assert not any(value.requires_grad for value in model.full.parameters())
    assert not any(module.training for module in model.modules())


def test_the_original_stays_in_eval_mode_while_the_branch_trains() -> None:
    _, task, model, _ = toy()
    modes: list[tuple[bool, bool]] = []
    model.branch.register_forward_hook(lambda net, *_: modes.append((net.training, model.full.training)))
    assert model.train().branch.training
    assert not any(module.training for module in model.full.modules())
    PerceiverExits(wanted=_WANTED).train(model, task, steps=1)
    assert modes[0] == (True, False)


def counted(model: BranchExits, big: nn.Module, x: Tensor) -> list[float]:
    return [macs(model.set_budget(budget), x) / macs(big, x) for budget in model.budgets]


def test_budgets_are_declared_as_they_are_counted_and_near_what_was_wanted() -> None:
    big, task, model, x = toy()
    for _ in range(2):
        assert counted(model, big, x) == pytest.approx(model.budgets, rel=1e-7)
        assert model.budgets[:-1] == pytest.approx(_WANTED, rel=0.1)
        assert all(low < high for low, high in itertools.pairwise(model.budgets))
        before = model.thresholds.clone()
        PerceiverExits(wanted=_WANTED).train(model, task, steps=8)
        assert not torch.equal(before, model.thresholds)


def test_tokens_that_nobody_waits_for_are_not_paid() -> None:
    big, _, model, x = toy()
    model.set_thresholds(x[:7], batch_size=4)
    unused = model.thresholds[:, -1].isinf()
    assert bool(unused.any())
    for level in unused.nonzero()[:, 0].tolist():
        seen = called(model)
        at(model, level)(x[:7])
        assert "head" in seen, "somebody goes on to the end"
    assert counted(model, big, x[:7]) == pytest.approx(model.budgets, rel=1e-7)


def test_a_recount_declares_what_other_samples_cost() -> None:
    big, _, model, _ = toy()
    other = images(200)[100:]
    model.recount(other)
    assert counted(model, big, other) == pytest.approx(model.budgets, rel=1e-7)


def test_prices_are_those_of_the_meter() -> None:
    big, _, model, x = toy()
    own, spent = model.prices(x)
    whole = macs(big, x)
    model.thresholds.zero_()
    assert float(own[0] + spent[0]) == pytest.approx(macs(at(model, 0), x) / whole)
    model.thresholds.copy_(torch.tensor([[2.0, 0.0, 2.0]]).expand(3, -1))
    assert float(own[1] + spent[1]) == pytest.approx(macs(at(model, 0), x) / whole)
    model.thresholds.copy_(torch.tensor([[2.0, 2.0, 1.0]]).expand(3, -1))  # never quite sure, so that all is run
    assert float(own[-1] + spent[-1]) == pytest.approx(macs(at(model, 0), x) / whole)
    assert float(spent[-1]) <= 0.15


def test_the_branch_is_as_wide_as_its_share_allows() -> None:
    big, x = classifier(), images()
    task = task_of(big, x)
    sizes = []
    for share in (0.09, 0.16, 0.4):
        model = PerceiverExits(share=share, width=32, wanted=(0.9,)).build(big, task)
        assert isinstance(model, BranchExits)
        assert float(model.prices(x)[1][-1]) <= share
        [edit] = history(model)
        assert isinstance(edit, AddPerceiver)
        sizes.append((max(edit.kernels), edit.width))
    assert sizes == [(3, 8), (7, 8), (7, 16)]


def test_the_start_of_the_exits_that_agrees_most_is_taken() -> None:
    big, _, model, x = toy()
    with torch.no_grad():  # the first exit is always sure of one class, the others as they were
        model.branch.exits[0].weight.zero_()  # type: ignore[union-attr, index, operator]
        model.branch.exits[0].bias.copy_(50.0 * torch.eye(10)[int(big(x).mean(0).argmin())])  # type: ignore[union-attr, index, operator]
    model.set_thresholds(x, batch_size=16)
    assert math.isinf(float(model.thresholds[-1, 0]))
    assert float(model.thresholds[-1, 1:].min()) <= 1.0


def test_a_sample_alone_is_answered_as_in_a_batch() -> None:
    _, _, model, x = toy()
    for level in range(len(_WANTED) + 1):
        out = at(model, level)(x)
        alone = torch.cat([model(each) for each in x.split(1)])
        torch.testing.assert_close(alone, out, atol=1e-12, rtol=0)
        order = torch.randperm(60, generator=torch.Generator().manual_seed(level))
        torch.testing.assert_close(model(x[order]), out[order], atol=1e-12, rtol=0)
        assert model(x[:0]).shape == (0, 10)


def test_gradients_reach_the_branch_and_the_input_at_every_budget_below_the_full_one() -> None:
    _, _, model, x = toy()
    model.thresholds[0] = torch.tensor([0.0, 0.0, 0.0])
    moving = x[:4].clone().requires_grad_()
    at(model, 0)(moving).sum().backward()
    assert moving.grad is not None
    assert bool(moving.grad.any())
    assert bool(model.branch.latents.grad.any())  # type: ignore[union-attr, operator]
    assert all(value.grad is None for value in model.full.parameters())
    grads = torch.autograd.grad(model.exits(x[:4]).sum(), list(model.branch.parameters()))
    assert all(bool(grad.any()) for grad in grads)


class _InPlace(nn.Module):
    """Changes what a waist has returned in place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Conv2d(16 if n else 1, 16, 3, padding=1) for n in range(4))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            F.relu_(x)
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def test_what_is_changed_in_place_behind_a_waist_is_read_as_it_was() -> None:
    big, x = _InPlace().double().eval(), images(40)
    model = PerceiverExits(exits=2, wanted=(0.8,), share=0.4).build(big, task_of(big, x))
    assert isinstance(model, BranchExits)
    for first, threshold in ((0, 0.0), (1, 2.0)):
        model.thresholds[0] = torch.tensor([threshold, 0.0])
        out = at(model, 0)(x)
        exits = model.exits(x)
        assert torch.equal(out, exits[:, first])
        exits.sum().backward()
        with torch.no_grad():
            torch.testing.assert_close(model(x), out, atol=1e-12, rtol=0)
        out.sum().backward()


def test_thresholds_are_found_on_samples_that_the_branch_never_learns_from() -> None:
    big, x = classifier(), images(400)
    task, procedure = task_of(big, x), PerceiverExits(wanted=_WANTED, samples=100)
    model = procedure.build(big, task, seed=3)
    assert isinstance(model, BranchExits)
    learned: list[Tensor] = []
    model.full.stem.register_forward_pre_hook(  # type: ignore[union-attr, operator]
        lambda net, args: learned.append(args[0]) if model.branch.training else None
    )
    procedure.train(model, task, steps=40, seed=3)
    places = {tuple(row) for row in torch.cat(learned).flatten(1).tolist()}
    held = torch.stack([row for row in x if tuple(row.flatten().tolist()) not in places])
    assert len(held) == 80
    assert counted(model, big, held) == pytest.approx(model.budgets, rel=1e-7)


def test_training_brings_the_exits_nearer_to_the_original() -> None:
    big, task, model, x = toy()

    def gaps() -> Tensor:
        said = model.exits(x).detach()
        target = big(x).detach().softmax(1)
        return torch.stack([F.kl_div(y.log_softmax(1), target, reduction="batchmean") for y in said.unbind(1)])

    before = gaps()
    PerceiverExits(wanted=_WANTED, alpha=1.0).train(model, task, steps=120)
    assert bool((gaps() < 0.5 * before).all())


def test_no_step_begins_after_the_deadline_and_nothing_is_declared_anew() -> None:
    _, task, model, _ = toy()
    before = copy.deepcopy(model.state_dict())
    assert PerceiverExits().train(model, task, steps=1000, deadline=time.monotonic()) == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(BadInput, match="steps must not be negative, got -1"):
        PerceiverExits().train(model, task, steps=-1)


def test_a_recipe_rebuilds_it(tmp_path: Path) -> None:
    _, task, model, x = toy()
    PerceiverExits(wanted=_WANTED).train(model, task, steps=3)
    recipe.save(at(model, 1), tmp_path, task="", budget=model.budget)
    again = recipe.apply(tmp_path, task=task)
    assert isinstance(again, BranchExits)
    assert again.budget == model.budget
    for budget in model.budgets:
        assert torch.equal(model.set_budget(budget)(x), again.set_budget(budget)(x))


def test_a_copy_is_read_by_its_own_branch() -> None:
    _, _, model, x = toy()
    twin = copy.deepcopy(at(model, 0))
    out = model(x)
    assert torch.equal(twin(x), out)
    with torch.no_grad():
        for value in twin.branch.parameters():
            value.zero_()
    assert torch.equal(model(x), out)
    assert not torch.equal(twin(x), out)


def test_a_model_without_what_the_branch_was_to_read_is_refused() -> None:
    _, _, model, _ = toy()
    [edit] = history(model)
    with pytest.raises(BadInput, match=r"no module 'blocks\.0'"):
        edit.rewrite(nn.Sequential(nn.Linear(2, 2)))


class _Odd(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.net = kind, ResidualNet(widths=(16, 32), depth=2)

    def forward(self, x: Tensor) -> Any:
        if self.kind == "branches" and bool(x.abs().max() > 100.0):
            x = x / 2
        count = len(x)
        out = self.net(x)
        if self.kind == "counts":
            return out.view(count, -1)
        if self.kind == "reads on":
            return out + x.mean((1, 2, 3))[:, None]
        return {"tuple": (out, out), "batch": out - out.mean(0)}.get(self.kind, out)


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("plain", {"distill": "values"}, "values"),
        ("tuple", {"logits": lambda out: out[0]}, "tuple"),
        ("batch", {}, "others of its batch"),
        ("plain", {"logits": lambda out: out[:, :2]}, "logits"),
        ("branches", {}, "branches on the values"),
        ("reads on", {}, "it has 0"),
        ("counts", {}, "it has 0"),
    ],
)
def test_what_can_have_no_exits_is_refused_with_the_reason(kind: str, options: dict[str, Any], reason: str) -> None:
    model = _Odd(kind).double().eval()
    task, procedure = task_of(model, images(), **options), PerceiverExits()
    assert procedure.applies_to(model, task) == []
    [refusal] = procedure.refusals(model, task)
    assert reason in refusal.reason
    assert (refusal.line is None) == (kind != "branches")
    with pytest.raises(BadInput, match="finds nothing"):
        procedure.build(model, task)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"share": 0.001}, "the least branch costs more than 0.001"),
        ({"wanted": (0.01, 0.1)}, "an answer at the first exit costs .* 0.01, 0.1"),
    ],
)
def test_a_branch_that_would_cost_too_much_is_refused(settings: dict[str, Any], reason: str) -> None:
    big = classifier()
    task, procedure = task_of(big, images()), PerceiverExits(**settings)
    assert procedure.applies_to(big, task) == []
    assert re.search(reason, procedure.refusals(big, task)[0].reason)


def test_a_network_without_images_inside_is_refused() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(d_model=16, depth=2, num_heads=2).double().eval()
    procedure = PerceiverExits()
    assert procedure.applies_to(model, task_of(model, images())) == []
    assert "(B, C, h, w)" in procedure.refusals(model, task_of(model, images()))[0].reason


def test_budgets_below_the_first_exit_are_left_out() -> None:
    big, x = classifier(), images()
    model = PerceiverExits(wanted=(0.05, 0.5)).build(big, task_of(big, x))
    assert isinstance(model, BranchExits)
    assert model.wanted == (0.5,)


@pytest.mark.parametrize(
    "setting",
    [
        *({"exits": 1}, {"wanted": ()}, {"wanted": (0.5, 0.4)}, {"wanted": (1.0,)}, {"share": 1.0}, {"samples": 0}),
        *({"alpha": 1.5}, {"temperature": 0.0}, {"width": 12}, {"latents": 6}, {"reduce": 3}, {"kernel": 4}),
        {"pooled": 0},
    ],
)
def test_bad_settings_are_refused(setting: dict[str, Any]) -> None:
    [name] = setting
    with pytest.raises(BadInput, match=name):
        PerceiverExits(**setting)


@pytest.mark.parametrize(
    "bad", [{"kernels": (3,)}, {"kernels": (2, 3)}, {"latents": 3}, {"width": 9}, {"classes": 0}, {"pooled": (0, 1)}]
)
def test_bad_branches_are_refused(bad: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"kernels": (3, 3), "pooled": (4, 4), "classes": 5, "width": 8, "latents": 4}
    with pytest.raises(BadInput):
        PerceiverBranch((4, 6), **{**settings, **bad})
