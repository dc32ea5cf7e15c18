"""N2N: the reward's algebra, policies that are distributions, students that are the teacher where all is kept."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.meters import params
from torchgraft.bench.models import ResidualNet
from torchgraft.bench.task import Split, Task
from torchgraft.engines.depth import LayerPath
from torchgraft.engines.network_policy import RATIOS, RemovalSpace, ShrinkSpace
from torchgraft.engines.policy_gradient import (
    ConstantBaseline,
    EmaBaseline,
    Episode,
    enumerate_actions,
    exact_objective,
    reinforce_loss,
)
from torchgraft.engines.surgery.edits import apply_edits, history
from torchgraft.errors import BadInput
from torchgraft.shrink.distill.n2n_learning import (
    N2NCompressor,
    N2NLearning,
    RemovalPolicy,
    ShrinkPolicy,
    distilled_score,
    layer_states,
    n2n_reward,
)

_X = torch.zeros(2, 1, 8, 8)


def _net() -> nn.Module:
    torch.manual_seed(0)
    return ResidualNet(widths=(12,), depth=3).eval()


def _task(model: nn.Module, *, values: bool = False) -> Task:
    draw = torch.Generator().manual_seed(0)
    split = Split(torch.randn(24, 1, 8, 8, generator=draw), torch.randint(10, (24,), generator=draw))
    if values:
        return Task(
            model,
            split,
            split,
            split,
            lambda o, t: F.mse_loss(o[:, 0], t.float()),
            lambda o, t: -(o[:, 0] - t).square(),
            distill="values",
            batch_size=8,
        )
    return Task(model, split, split, split, F.cross_entropy, lambda o, t: (o.argmax(-1) == t).float(), batch_size=8)


def test_reward_of_the_teacher_is_zero_and_of_nothing_is_the_accuracy_kept() -> None:
    assert n2n_reward(0.9, 100, 0.9, 100) == 0.0
    assert n2n_reward(0.45, 0, 0.9, 100) == pytest.approx(0.5)
    assert n2n_reward(0.8, 50, 0.8, 100) == pytest.approx(0.75)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 999_998), st.floats(0.1, 1.0))
def test_reward_has_slope_two_times_one_minus_compression(parameters: int, accuracy: float) -> None:
    total = 1_000_000
    rise = n2n_reward(accuracy, parameters - 1, 1.0, total) - n2n_reward(accuracy, parameters + 1, 1.0, total)
    slope = rise / (2 / total)
    compression = 1 - parameters / total
    assert slope == pytest.approx(accuracy * 2 * (1 - compression), rel=1e-4, abs=1e-6)


def test_a_broken_constraint_hardens() -> None:
    free = n2n_reward(0.9, 50, 0.9, 100)
    rewards = [n2n_reward(0.9, 50, 0.9, 100, constraint={"parameters": 40}, epoch=e) for e in (0, 5, 14, 15, 40)]
    assert rewards[0] == pytest.approx(free)
    assert rewards[1] == pytest.approx((2 / 3) ** 4 * (1 + free) - 1)
    assert rewards == sorted(rewards, reverse=True)
    assert rewards[-2:] == [-1.0, -1.0]
    assert n2n_reward(0.9, 50, 0.9, 100, constraint={"parameters": 50, "accuracy": 0.9}, epoch=9) == free
    assert n2n_reward(0.9, 50, 0.9, 100, constraint={"accuracy": 0.95}, epoch=20) == -1.0


def _log_prob(policy: nn.Module, states: Tensor, actions: tuple[int, ...]) -> Tensor:
    together = isinstance(policy, RemovalPolicy)
    forced = [torch.tensor(actions)] if together else [torch.tensor([place]) for place in actions]
    episode = Episode(forced=forced)
    policy.act(states, episode)  # type: ignore[operator]
    return episode.log_prob


@pytest.mark.parametrize("kind", ["remove", "shrink"])
def test_policies_are_distributions_over_action_strings(kind: str) -> None:
    torch.manual_seed(0)
    states = torch.randn(3, 7)
    policy = RemovalPolicy(7) if kind == "remove" else ShrinkPolicy(7, choices=4)
    strings = list(enumerate_actions((2, 2, 2) if kind == "remove" else (4, 4, 4)))
    total = torch.stack([_log_prob(policy, states, a) for a in strings]).exp().sum()
    assert float(total.detach()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("kind", ["remove", "shrink"])
@pytest.mark.parametrize("baseline", [ConstantBaseline(), EmaBaseline()])
def test_estimates_average_to_the_exact_gradient(kind: str, baseline: ConstantBaseline | EmaBaseline) -> None:
    torch.manual_seed(0)
    states = torch.randn(3, 7)
    policy = RemovalPolicy(7, hidden=4) if kind == "remove" else ShrinkPolicy(7, choices=2, hidden=4)
    watched = list(policy.head.parameters())
    strings = list(enumerate_actions((2, 2, 2)))
    table = dict(zip(strings, (0.1, 1.0, -0.4, 0.6, 0.3, 2.0, -1.0, 0.5), strict=True))
    log_probs = torch.stack([_log_prob(policy, states, a) for a in strings])
    exact = torch.cat(
        [
            g.flatten()
            for g in torch.autograd.grad(exact_objective(log_probs, torch.tensor(list(table.values()))), watched)
        ]
    )
    draw, estimates = torch.Generator().manual_seed(1), []
    for _ in range(250):
        episode = Episode(generator=draw)
        reward = torch.tensor([table[policy.act(states, episode)]])
        loss = reinforce_loss(episode.log_prob[None], baseline.advantages(reward))
        estimates.append(-torch.cat([g.flatten() for g in torch.autograd.grad(loss, watched)]))
    found = torch.stack(estimates)
    error = found.std(0) / len(found) ** 0.5
    assert bool(((found.mean(0) - exact).abs() <= 3 * error).all())
    assert float((exact.abs() / error).max()) > 3  # zeros would not pass


def test_keeping_all_rebuilds_the_teacher() -> None:
    net = _net()
    for space, action in ((RemovalSpace(net, _X), 1), (ShrinkSpace(net, _X), len(RATIOS) - 1)):
        edits = space.edits([action] * len(space.layers))
        made = apply_edits(net, edits)
        assert edits == []
        assert params(made) == params(net)
        assert torch.equal(made(_X + 1), net(_X + 1))


def test_students_are_what_the_actions_say() -> None:
    net = _net()
    removal = RemovalSpace(net, _X)
    assert removal.layers == ["blocks.0", "blocks.1", "blocks.2"]
    assert removal.edits((1, 0, 1)) == [LayerPath(name="blocks", size=3, path=(0, 2))]
    with pytest.raises(BadInput, match="at least one layer"):
        removal.edits((0, 0, 0))
    shrink = ShrinkSpace(net, _X, least_units=2)
    made = apply_edits(net, shrink.edits([4] * len(shrink.layers)))
    assert {m.out_channels for m in made.modules() if isinstance(m, nn.Conv2d)} == {6}
    kept = apply_edits(net, ShrinkSpace(net, _X).edits([0] * len(shrink.layers)))
    assert {m.out_channels for m in kept.modules() if isinstance(m, nn.Conv2d)} == {10}  # the floor


def test_states_describe_layers() -> None:
    net = nn.Sequential(nn.Conv2d(1, 32, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(512, 64))
    states = layer_states(net, ["0", "2"], [False, True])
    assert states.tolist() == [
        [1.0, 1.0, 1.0, 1.0, 0.5, 0.0, 0.0],
        [0.0, pytest.approx(1 / 3), 0.5, 0.0, 1.0, 1.0, 1.0],
    ]


def test_the_search_ends_on_the_best_string() -> None:
    """Accuracy is 1 only while block 1 stays: then the best student keeps it and nothing else."""
    net, calls = _net(), []

    def evaluate(student: nn.Module) -> float:
        calls.append(student)
        paths = [edit.path for edit in history(student) if isinstance(edit, LayerPath)]
        return 1.0 if not paths or 1 in paths[0] else 0.1

    search = N2NCompressor(net, evaluate, example=_X, epochs=80, lr=0.02, teacher_accuracy=1.0)
    student, trials = search.fit()
    assert history(student) == (LayerPath(name="blocks", size=3, path=(1,)),)
    assert (search.policy(search.space.states) > 0).tolist() == [False, True, False]
    assert len(calls) <= 7  # repeated architectures are not trained again
    early, late = (sum(trial.reward for trial in part) / 100 for part in (trials[:100], trials[-100:]))
    assert late > early + 0.3
    impossible = [trial for trial in trials if trial.actions == (0, 0, 0)]
    assert impossible
    assert {trial.reward for trial in impossible} == {-1.0}


def test_under_a_constraint_nothing_is_remembered() -> None:
    calls = []
    search = N2NCompressor(
        _net(),
        lambda student: calls.append(student) or 1.0,  # type: ignore[func-returns-value]
        example=_X,
        stage="shrink",
        epochs=2,
        rollouts=3,
        constraint={"parameters": 1},
        teacher_accuracy=1.0,
    )
    _, trials = search.fit()
    assert len(calls) == len(trials) == 6
    assert trials[-1].reward < n2n_reward(1.0, trials[-1].parameters, 1.0, search.teacher_parameters)


def test_distilled_score_trains_the_student() -> None:
    torch.manual_seed(0)
    net = _net()
    task = _task(net)
    student = apply_edits(net, RemovalSpace(net, _X).edits((1, 0, 0)))
    before = [value.clone() for value in student.parameters()]
    found = distilled_score(task, net, steps=2)(student)
    assert 0 <= found <= 1
    assert any(not torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))
    assert distilled_score(_task(net, values=True), net, steps=1)(student) > 0  # scores below zero: one over the loss


def test_distilled_score_draws_the_logits_to_the_teachers() -> None:
    torch.manual_seed(0)
    net = _net()
    task = _task(net)
    free = Task(net, task.train, task.val, task.test, lambda o, t: 0.0 * o.sum(), task.score, batch_size=8)
    with torch.no_grad():
        net.head.weight.mul_(10.0)
    student = ResidualNet(widths=(12,), depth=1)

    def gap() -> float:
        with torch.no_grad():
            return float((student.eval()(task.train.inputs) - net(task.train.inputs)).square().mean())

    before = gap()
    distilled_score(free, net, steps=90, weight=1.0, lr=1e-2)(student)
    assert gap() < 0.5 * before


def test_blocks_go_in_one_order() -> None:
    net = _net()
    task = _task(net)
    procedure = N2NLearning(epochs=2, rollouts=2, steps=1)
    left = [len(procedure.apply(net, task, strength).blocks) for strength in (0.0, 0.3, 0.5, 0.8, 1.0)]  # type: ignore[arg-type]
    assert left == [3, 2, 2, 1, 1]
    assert procedure.applies_to(net, task, ignore=["blocks.1"]) == []


def test_bad_input() -> None:
    with pytest.raises(BadInput, match="teacher"):
        n2n_reward(0.5, 1, 0.0, 10)
    with pytest.raises(BadInput, match="constraint"):
        N2NCompressor(_net(), lambda student: 1.0, example=_X, constraint={"latency": 1})
    with pytest.raises(BadInput, match="stage"):
        N2NCompressor(_net(), lambda student: 1.0, example=_X, stage="both")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="rollouts"):
        N2NCompressor(_net(), lambda student: 1.0, example=_X, rollouts=0)
    with pytest.raises(BadInput, match="nothing to remove"):
        N2NCompressor(nn.Linear(2, 2), lambda student: 1.0, example=torch.zeros(1, 2))
    with pytest.raises(BadInput, match="actions"):
        RemovalSpace(_net(), _X).edits((1,))
    with pytest.raises(BadInput, match="epochs"):
        N2NLearning(epochs=0)
