"""Blocks that run by sample: forced plans are surgery, soft gates of 0 and 1 are skipping, costs are counted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from torchgraft.bench.meters import macs
from torchgraft.engines.skipping import (
    FoldedLinear,
    RoutedBlock,
    RoutedModel,
    calibrate_routers,
    router_edit,
    skippable,
)
from torchgraft.engines.surgery.edits import apply_edits


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.seen: list[int] = []

    def forward(self, x: Tensor, flag: bool = False) -> Tensor:
        self.seen.append(len(x))
        out: Tensor = x + torch.tanh(self.fc(x))
        return out


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def routed(rank: int = 2) -> tuple[Net, RoutedModel, Tensor]:
    torch.manual_seed(0)
    model = Net().double().eval()
    x = torch.randn(12, 5, 6, dtype=torch.float64)
    made = apply_edits(model, [router_edit(skippable(model, x, ()), (0.4, 0.7), 0, rank, False)]).eval()
    assert isinstance(made, RoutedModel)
    return model, made, x


def test_a_forced_plan_equals_the_model_without_those_blocks() -> None:
    model, made, x = routed()
    made.set_budget(0.4)
    made.force([True] * 4)
    assert torch.equal(made(x), model(x))
    made.force([True, False, False, True])
    shorter = Net().double()
    shorter.blocks = nn.ModuleList([model.blocks[0], model.blocks[3]])
    assert torch.equal(made(x), shorter(x))


def test_samples_are_routed_one_by_one_and_skipped_ones_unseen() -> None:
    model, made, x = routed()
    made.set_budget(0.4)
    plan = torch.rand(12, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    plan[:, 2] = False
    made.force(list(plan.unbind(1)))
    for block in made.blocks:
        block.block.seen.clear()
    found = made(x)
    for row in range(12):
        h = x[row : row + 1]
        for place, inner in enumerate(model.blocks):
            h = inner(h) if plan[row, place] else h
        assert torch.allclose(found[row], h[0], atol=1e-12)
    seen = [block.block.seen for block in made.blocks]
    assert seen == [[count] if count else [] for count in plan.sum(0).tolist()]


@pytest.mark.parametrize("gate", [False, True])
def test_soft_gates_of_0_and_1_are_hard_ones(gate: bool) -> None:
    _, made, x = routed()
    made.set_budget(0.4)
    with torch.no_grad():
        for block in made.blocks:
            block.router.weight.zero_()
            block.router.bias.fill_(800.0 if gate else -800.0)
    hard = made(x)
    for block in made.blocks:
        block.soft = True
    assert torch.equal(made(x), hard)


def test_the_gate_is_the_mean_over_the_tokens_that_decide() -> None:
    torch.manual_seed(0)
    block = RoutedBlock(nn.Identity(), 3, dim=1, levels=1, prompt=2, bias=0.3).double()
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    wanted = torch.stack(
        [torch.sigmoid(block.router(image[:, 0].T)).mean() for image in x]  # the first two of four places
    )
    assert torch.allclose(block.scores(x), wanted, atol=1e-12)


def test_a_second_weight_is_used_below_the_full_budget_only() -> None:
    _, made, x = routed()
    full = made(x)
    adapter = made.adapters[0]
    assert isinstance(adapter, FoldedLinear)
    with torch.no_grad():
        adapter.high.normal_()
    made.set_budget(0.4)
    made.force([True] * 4)
    assert torch.equal(made(x), full), "not folded yet"
    adapter.open = True
    trained = made(x)
    adapter.open = False
    adapter.fold()
    assert torch.allclose(made(x), trained, atol=1e-12)
    assert not torch.allclose(trained, full)
    made.set_budget(1.0)
    assert torch.equal(made(x), full)


def test_calibration_meets_its_budgets_and_declares_what_is_counted() -> None:
    _, made, x = routed()
    with torch.no_grad():
        for block in made.blocks:
            block.router.weight.normal_()
    calibrate_routers(made, x)
    total = macs(made, x)
    for budget, wanted in zip(made.budgets[:-1], made.wanted, strict=True):
        counted = macs(made.set_budget(budget), x) / total
        assert counted == pytest.approx(budget, abs=1e-6)
        routers = 6 / 36  # of a router beside its block
        assert budget - routers == pytest.approx(wanted * (1 - routers), abs=0.08)


def test_blocks_with_other_tensors_are_refused() -> None:
    class Two(Net):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x, torch.ones(1))
            return x

    torch.manual_seed(0)
    refused: list[object] = []
    assert skippable(Two().eval(), torch.randn(3, 5, 6), (), refused) == {}  # type: ignore[arg-type]
    assert len(refused) == 4
    assert skippable(Net().eval(), torch.randn(3, 5, 6), ("blocks.*",)) == {}
