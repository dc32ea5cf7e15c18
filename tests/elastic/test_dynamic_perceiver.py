"""Dynamic Perceiver: two branches that can be told apart, exits that stop the work, thresholds by budget."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.meters import macs
from torchgraft.contracts import Check, Subject, checks_for, modules
from torchgraft.contracts.run import run_check
from torchgraft.elastic import dynamic_perceiver
from torchgraft.elastic.dynamic_perceiver import CARD, EXITS, DynPerceiver, ExitPolicy, exit_loss
from torchgraft.errors import BadInput

#: What the card would say if it were that of the network alone.
PART = CARD.model_copy(
    update={
        "kind": "part",
        "entry": "DynPerceiver",
        "capabilities": frozenset({"channels-first"}),
        "example": {"channels": 3, "classes": 5, "width": 8, "latents": 16, "reduce": 2, "kernel": 3},
        "shapes": ((4, 3, 16, 16),),
        "declared": {
            "parameters": "9 * channels * width + 9 * 42 * width**2 + 9 * 85 * width**2"  # convolutions
            " + 4 * 15 * width"  # and their norms
            " + latents * width + kernel**2 * 15 * width"  # latent tokens, depth-wise convolutions
            " + 2 * (5 * 15 * width + 4 * 85 * width**2 // reduce)"  # both directions of cross-attention
            " + 8 * 85 * width**2 + 8 * 15 * width"  # self-attention
            " + 6 * 7 * width + 2 * 21 * width**2 + 21 * latents**2 // 32 + 7 * latents // 8"  # between stages
            " + 2 * (classes**2 + 3 * classes) + 36 * width * classes + 2 * classes**2 + 4 * classes"  # exits
            " + 2 * (16 * width + classes)"
        },
    }
)
PROMISED = [check for check in checks_for(PART) if check in modules.CHECKS or check.name == "entry-is-documented"]
SUBJECT = Subject(PART, DynPerceiver, dynamic_perceiver)


@pytest.mark.parametrize("check", PROMISED, ids=lambda check: check.name)
def test_the_network_keeps_the_contract_of_parts(check: Check) -> None:
    result = run_check(check, SUBJECT)
    assert result.outcome == "passed", result.reason


def test_the_contract_of_parts_is_all_that_a_part_promises_beside_its_card() -> None:
    others = {check.name for check in checks_for(PART)} - {check.name for check in PROMISED}
    assert others <= {check.name for check in checks_for(CARD)}
    assert len(PROMISED) >= 23


def model(**changes: object) -> DynPerceiver:
    torch.manual_seed(0)
    settings = {"classes": 5, "width": 8, "latents": 16, "reduce": 2, "kernel": 3, **changes}
    made = DynPerceiver(1, **settings).double().eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for value in made.parameters():
            value.add_(0.1 * torch.randn_like(value))
    return made


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 1, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_without_feedback_the_features_are_the_plain_network() -> None:
    made, x = model(z2x=False), images()
    plain = x
    for stage in made.stages:
        plain = stage(plain)
    assert torch.equal(made(x)[:, EXITS.index("x")], made.exit_x(plain.mean((2, 3))))
    told = model()
    told.load_state_dict(made.state_dict())
    assert not torch.allclose(told(x)[:, 2], made(x)[:, 2])


def test_without_reading_the_latent_tokens_know_nothing_of_the_image() -> None:
    logits = model(x2z=False)(images())
    for exit_ in ("z3", "z4"):
        y = logits[:, EXITS.index(exit_)]
        assert torch.equal(y, y[:1].expand_as(y))
    assert not torch.allclose(logits[0, 2], logits[1, 2])
    read = model()(images())
    assert not torch.allclose(read[0, 0], read[1, 0])


def test_the_first_exit_has_no_gradient_to_the_fourth_stage() -> None:
    made = model()
    made(images())[:, 0].sum().backward()
    later = [made.stages[3], made.look[3], made.read[3], made.think[3], made.tell[2], made.tell[3], made.onward[2]]
    assert all(value.grad is None or not bool(value.grad.any()) for part in later for value in part.parameters())
    earlier = [made.stages[2], made.think[2], made.tell[1]]
    assert all(value.grad is not None and bool(value.grad.any()) for part in earlier for value in part.parameters())


def test_early_exits_say_what_the_full_pass_says_there_and_cost_less() -> None:
    made, x = model(), images(12)
    logits = made(x)
    policy = ExitPolicy.from_budget(logits.detach(), made.exit_costs(x), ratio=1.0)
    answers, exits = made.predict(x, policy)
    assert torch.equal(exits, policy.choose(logits.detach()))
    assert exits.unique().tolist() == [0, 1, 2, 3]
    assert torch.allclose(answers, logits[torch.arange(12), exits], atol=1e-12)
    for row in range(12):
        alone, exit_ = made.predict(x[row : row + 1], policy)
        assert int(exit_) == int(exits[row])
        assert torch.allclose(alone[0], answers[row], atol=1e-12)
    calls = []
    made.stages[3].register_forward_hook(lambda *_: calls.append(1))
    made.predict(x[exits == 0], policy)
    assert not calls


def test_costs_are_those_of_the_meter_and_rise() -> None:
    made, x = model(), images(3)
    costs = made.exit_costs(x)
    assert bool((costs.diff() > 0).all())
    assert float(costs[-1]) * 3 == macs(made, x)


def test_shares_and_cost_on_calibration_samples_are_exact() -> None:
    made, x = model(), images(40)
    logits, costs = made(x).detach(), made.exit_costs(x[:1])
    policy = ExitPolicy.from_budget(logits, costs, ratio=0.5)
    counts = torch.bincount(policy.choose(logits), minlength=4)
    assert counts.tolist() == [21, 10, 5, 4]  # floor(40 * (8, 4, 2, 1) / 15), the rest at the last
    assert policy.cost(logits, costs) == pytest.approx(float(counts.double() @ costs) / 40)
    budget = float(costs[0] + costs[-1]) / 2
    assert ExitPolicy.from_budget(logits, costs, budget=budget).cost(logits, costs) == pytest.approx(budget, rel=0.05)


def test_the_loss_by_hand() -> None:
    logits = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0, 3, 2])
    each = [F.cross_entropy(logits[:, e], target) for e in range(4)]
    last = logits[:, 3].softmax(-1)
    apart = sum(F.kl_div(logits[:, e].log_softmax(-1), last, reduction="batchmean") for e in range(3))
    assert torch.allclose(exit_loss(logits, target), 0.5 * (each[0] + each[1]) + each[2] + each[3] + 0.5 * apart)


def test_the_last_exit_is_taught_by_the_labels_alone() -> None:
    logits = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 3, 2])
    (found,) = torch.autograd.grad(exit_loss(logits, target, distill=5.0, temperature=2.0), logits)
    one_hot = F.one_hot(target, 5)
    wanted = (logits.detach()[:, 3].softmax(-1) - one_hot) / 3
    assert torch.allclose(found[:, 3], wanted, atol=1e-12)
    # Of an earlier exit: its own cross-entropy, and T^2 KL to the last, whose gradient is T (q - p) / N.
    apart = (logits.detach()[:, 0] / 2).softmax(-1) - (logits.detach()[:, 3] / 2).softmax(-1)
    wanted = 0.5 * (logits.detach()[:, 0].softmax(-1) - one_hot) / 3 + 5.0 * 2.0 * apart / 3
    assert torch.allclose(found[:, 0], wanted, atol=1e-12)


def test_other_stages_can_be_given() -> None:
    torch.manual_seed(0)
    widths = (4, 6, 6, 10)
    stages = [nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip((1, *widths), widths, strict=False)]
    made = DynPerceiver(1, classes=3, width=8, latents=8, stages=stages, widths=widths)
    assert made(torch.randn(2, 1, 32, 32)).shape == (2, 4, 3)


@pytest.mark.parametrize(
    "bad", [{"width": 12}, {"latents": 4}, {"kernel": 2}, {"classes": 0}, {"widths": (1, 2, 3, 4)}]
)
def test_bad_settings_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(BadInput):
        DynPerceiver(1, **bad)  # type: ignore[arg-type]


def test_bad_policies_are_refused() -> None:
    with pytest.raises(BadInput, match="either"):
        ExitPolicy.from_budget(torch.zeros(2, 4, 3), torch.arange(1.0, 5.0))
    with pytest.raises(BadInput, match="budget"):
        ExitPolicy.from_budget(torch.zeros(2, 4, 3), torch.arange(1.0, 5.0), budget=9.0)
