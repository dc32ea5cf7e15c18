"""Training inside a procedure: its first step by hand, and what is held still."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from torchgraft.bench.task import Task
from torchgraft.engines.finetune import finetune, holding


def _task() -> Task:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 3)).double()
    x, y = torch.randn(12, 4, dtype=torch.float64), torch.randint(0, 3, (12,))
    score = lambda out, target: (out.argmax(1) == target).float()  # noqa: E731
    return Task(model, (x, y), (x, y), (x, y), nn.functional.cross_entropy, score, batch_size=12, learning_rate=0.01)


def test_the_first_step_is_adams() -> None:
    task = _task()
    model = task.trained()
    reference = copy.deepcopy(model).train()
    assert isinstance(task.train.inputs, Tensor)
    task.loss(reference(task.train.inputs), task.train.target).backward()
    norm = nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
    assert norm > 0
    finetune(model, task, steps=1, lr=0.03)
    for before, after in zip(reference.parameters(), model.parameters(), strict=True):
        assert before.grad is not None
        expected = before.detach() - 0.03 * before.grad / (before.grad.abs() + 1e-8)
        sure = before.grad.abs() > 1e-6  # where the order of samples cannot turn the sign
        assert torch.allclose(after[sure], expected[sure], atol=1e-6)
    assert not model.training


def test_what_is_ignored_neither_moves_nor_counts() -> None:
    task = _task()
    model = task.trained().train()
    model[4].eval()
    model[3].bias.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    finetune(model, task, steps=3, ignore=["1", "4"])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name[0] in "14" or name == "3.bias"), name
    assert [one.training for one in model] == [True] * 4 + [False]
    flags = {name for name, value in model.named_parameters() if not value.requires_grad}
    assert flags == {"3.bias"}
    x = torch.randn(5, 4, dtype=torch.float64)
    model(x)  # the norm counts again: nothing of the training is left behind
    assert not torch.equal(model[1].running_mean, before["1.running_mean"])


def test_flags_come_back_after_an_error_and_shared_parameters_are_held() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight

    def stop(_: object) -> None:
        assert not model[0].weight.requires_grad
        assert model[0].bias.requires_grad
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), holding(model, ["1"]):
        stop(model)
    assert all(value.requires_grad for value in model.parameters())
    assert model.training
    assert not model._forward_pre_hooks
